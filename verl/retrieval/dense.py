"""Dense retrieval: a FAISS flat inner-product index over the vectors of an encoder, searched exactly."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
import transformers
from tqdm import tqdm

from verl.errors import ConfigError, DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder import Encoder, load_encoder
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig
from verl.retrieval.engine import IndexInfo, check_topk, engine_info
from verl.retrieval.ranking import best_first
from verl.types import SearchResult

logger = logging.getLogger(__name__)

_DOCUMENTS_PER_CHUNK = 2048
_SAME_VECTOR = 0.99
"""Cosine above which two vectors of one document are taken to come from the same encoder; half precision and other
hardware leave 0.999 and more, another model leaves nearly nothing."""


class DenseEngine:
    """Searches a dense index; every document has a score, so every query gets `topk` documents."""

    def __init__(self, info: IndexInfo, index: faiss.Index, encoder: Encoder, corpus: Corpus) -> None:
        self.corpus = corpus
        self.info = engine_info(info)
        self._index = index
        self._encoder = encoder

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """See `verl.retrieval.engine.Engine.search`."""
        check_topk(topk, self.info)
        if not queries:
            return []
        scores, rows = self._index.search(self._encoder.encode_queries(queries), topk)
        return [best_first(self.corpus, *hit, topk) for hit in zip(queries, rows, scores, strict=True)]

    def close(self) -> None:
        """See `verl.retrieval.engine.Engine.close`."""


def write_index(
    corpus: Corpus, folder: Path, retriever_name: str, model: str | None, config: EncoderConfig
) -> IndexInfo:
    """Encode `corpus` and write its index into `folder`.

    Raises:
        ConfigError: the encoder cannot be loaded.
    """
    encoder = load_encoder(retriever_name, model, config)
    index = faiss.IndexFlatIP(encoder.width)
    with tqdm(total=len(corpus), desc=f"encoding with {retriever_name}", unit="doc") as progress:
        for start in range(0, len(corpus), _DOCUMENTS_PER_CHUNK):
            passages = [doc.contents for doc in corpus.documents(start, start + _DOCUMENTS_PER_CHUNK)]
            index.add(encoder.encode_passages(passages))
            progress.update(len(passages))
    if encoder.truncated:
        logger.warning(
            "%d of %d passages were cut at %d tokens", encoder.truncated, len(corpus), encoder.spec.max_length
        )
    faiss.write_index(index, str(folder / index_file(retriever_name)))
    return index_info(corpus, retriever_name, model)


def index_info(corpus: Corpus, retriever_name: str, model: str | None) -> IndexInfo:
    """Return what `index.json` says about the dense index of `corpus`."""
    versions = {"faiss": faiss.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    settings = {"kind": "Flat", "max_length": ENCODERS[retriever_name].max_length}
    return IndexInfo(retriever_name, model, corpus.fingerprint, len(corpus), settings, versions)


def index_file(retriever_name: str) -> str:
    """Return the published name of a flat index, for example `e5_Flat.index`."""
    return f"{retriever_name}_Flat.index"


def open_engine(
    folder: Path, corpus: Corpus, info: IndexInfo, model: str | None = None, threads: int | None = None
) -> DenseEngine:
    """Memory-map the index in `folder` and load its encoder.

    Raises:
        ConfigError: the encoder cannot be loaded, or is not the one that the index was built with.
        DataError: the index file is missing or damaged.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
    path = folder / index_file(info.retriever)
    if not path.is_file():
        raise DataError(f"index {folder} is damaged: {path.name} is missing; build it again with --overwrite")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"index {path} is damaged ({reason}); build it again with --overwrite") from error
    if index.ntotal != len(corpus):
        raise DataError(
            f"index {path} is damaged: it holds {index.ntotal} vectors for {len(corpus)} documents; build it again "
            "with --overwrite"
        )
    encoder = load_encoder(info.retriever, model or info.model)
    _check_encoder(index, encoder, corpus, path)
    return DenseEngine(info, index, encoder, corpus)


def _check_encoder(index: faiss.Index, encoder: Encoder, corpus: Corpus, path: Path) -> None:
    """Encode the first document again: only the encoder that built the index finds its vector."""
    remedy = "pass the --retriever_model that it was built with, or build it again with --overwrite"
    if index.d != encoder.width:
        raise ConfigError(
            f"index {path} holds vectors of {index.d} numbers, the encoder makes {encoder.width}; {remedy}"
        )
    stored = index.reconstruct(0)
    vector = encoder.encode_passages([corpus[0].contents])[0]
    cosine = float(stored @ vector / max(float(np.linalg.norm(stored) * np.linalg.norm(vector)), 1e-12))
    if not cosine >= _SAME_VECTOR:
        raise ConfigError(
            f"index {path} was built with another encoder: the vectors of its first document have cosine {cosine:.3f}, "
            f"expected at least {_SAME_VECTOR}; {remedy}"
        )
