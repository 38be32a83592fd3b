"""Building a dense index: encode the corpus, resumably, and write the vectors as an index file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from verl.errors import ConfigError, DataError
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import check_vectors, index_file, index_info
from verl.retrieval.encoder import load_encoder
from verl.retrieval.engine import IndexInfo
from verl.retrieval.file_mark import file_mark
from verl.retrieval.index_file import write_index_file
from verl.retrieval.index_kinds import IndexLayout, lay_out
from verl.retrieval.search_config import Tuning
from verl.retrieval.tune import TuneConfig, sample_queries, tune
from verl.retrieval.vectors import INFO_NAME, encode_corpus, open_embeddings

_MARGIN = 1.02
"""Room for what an index holds besides the codes that its layout counts."""


class DenseBuilder:
    """Builds one dense index.

    The vectors lie in `<save_dir>.vectors/` meanwhile, so that a build that was killed goes on where it was.

    Args:
        target: the folder that the index will have in the end.

    Raises:
        ConfigError: the encoder cannot be loaded, or the corpus is too small for the kind of index.
    """

    def __init__(self, corpus: Corpus, retriever_name: str, options: BuildOptions, target: Path) -> None:
        self._corpus = corpus
        self._options = options
        self._target = target
        self._scratch = vectors_folder(target)
        self._encoder = load_encoder(retriever_name, options.model, options.encoder, options.encoder_overrides)
        self._layout = lay_out(options.index, len(corpus), self._encoder.width)
        self._vectors: np.ndarray | None = None
        self.planned = index_info(corpus, retriever_name, options.model, options.index, self._encoder.spec)

    def write(self, folder: Path) -> IndexInfo:
        """Write the index into `folder`.

        Raises:
            ConfigError: the vectors at `embedding_path` are another encoder's.
            DataError: too little room on the disk, or vectors that are not those of the corpus.
            OSError: a file cannot be written.
        """
        self._check_room()
        self._vectors = self._load_vectors()
        path = folder / index_file(self.planned.retriever, self._layout.kind)
        write_index_file(self._layout, self._vectors, path)
        return replace(self.planned, files={path.name: file_mark(path)})

    def finish(self, built: bool) -> None:
        """Tune the index where it lies now, if that was asked for, and remove the vectors unless they are to be kept.

        Raises:
            DataError: no search parameter reaches the recall that was asked for; index and vectors stay.
        """
        recall = self._options.target_recall
        if recall is not None and not self._is_tuned(recall):
            config = TuneConfig(target_recall=recall)
            texts = sample_queries(self._corpus, config.sample, config.seed)
            tune(self._target, self._corpus, self._encoder.encode_queries(texts), self._known_vectors(), config)
        self._vectors = None
        if built and not self._options.save_embedding and self._scratch.is_dir():
            shutil.rmtree(self._scratch)

    def _is_tuned(self, recall: float) -> bool:
        found = Tuning.load(self._target, next(iter(IndexInfo.load(self._target).files.values()), ""))
        return found is not None and found.target_recall == recall

    def _known_vectors(self) -> np.ndarray | None:
        """Return the vectors where they need not be made first."""
        if self._vectors is None and (self._options.embedding_path or (self._scratch / INFO_NAME).is_file()):
            self._vectors = self._load_vectors()
        return self._vectors

    def _load_vectors(self) -> np.ndarray:
        path = self._options.embedding_path
        if path is None:
            return self._encode()
        vectors = open_embeddings(path, len(self._corpus), self._encoder.width)
        check_vectors(lambda row, _: vectors[row], "Flat", self._encoder, self._corpus, path)
        return vectors

    def _encode(self) -> np.ndarray:
        try:
            return encode_corpus(self._corpus, self._encoder, self._scratch)
        except (ConfigError, DataError) as error:
            # Only what lies there and is damaged or of something else is begun anew, and its errors name it first.
            if not (self._options.overwrite and str(error).startswith(str(self._scratch))):
                raise
        return encode_corpus(self._corpus, self._encoder, self._scratch, overwrite=True)

    def _check_room(self) -> None:
        there = sum(item.stat().st_size for item in self._scratch.rglob("*")) if self._scratch.is_dir() else 0
        encodes = self._options.embedding_path is None
        check_room(self._layout, there, encodes, shutil.disk_usage(self._target.parent).free, self._target)


def check_room(layout: IndexLayout, there: int, encodes: bool, free: int, target: Path) -> None:
    """Refuse to begin what the disk cannot hold; hours later it would be known anyway.

    Args:
        there: bytes of vectors that an earlier run left.
        encodes: whether vectors are made at all.
        free: bytes on the file system of `target`.

    Raises:
        DataError: says how much it takes and how much there is.
    """
    vectors = max(0, 4 * layout.rows * layout.width - there) if encodes else 0
    needed = int(_MARGIN * layout.index_bytes) + vectors
    if needed > free:
        raise DataError(
            f"building {layout.kind} takes {needed / 1e9:.3g} GB more beside {target} ({vectors / 1e9:.3g} GB of it "
            f"for vectors, until it is done), and {free / 1e9:.3g} GB are free; make room, or pass another --save_dir"
        )


def vectors_folder(target: Path) -> Path:
    """Return where the vectors of the index at `target` lie while it is built."""
    return target.with_name(f"{target.name}.vectors")
