"""Dense retrieval: an encoder's vectors in a FAISS index, opened, checked and searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import faiss
import numpy as np
import torch
import transformers

from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense_gpu import check_gpus, gpu_source
from verl.retrieval.dense_search import FlatSource, ListSource, RowSource, Source, nearest, stored_vector
from verl.retrieval.encoder import Encoder, load_encoder
from verl.retrieval.encoder_spec import EncoderConfig, EncoderSpec, Setting, recorded_spec, spec_settings
from verl.retrieval.engine import IndexInfo, check_topk, engine_info
from verl.retrieval.file_mark import file_mark
from verl.retrieval.index_file import kind_of, read_index_file
from verl.retrieval.index_kinds import IndexConfig
from verl.retrieval.ranking import best_first
from verl.retrieval.search_config import SearchConfig, Tuning, settle
from verl.types import SearchResult

_CHECKED = 5
"""Documents, spread over the corpus, whose vectors are made again when an index is opened."""
_SAME_VECTOR = 0.99
"""Cosine above which two vectors of one document are taken to come from the same encoder; half precision, other
hardware and scalar codes leave 0.999 and more, another model leaves much less."""
_SAME_CODE = 0.5
"""The same for product-quantised vectors."""
_EQUAL = 1e-3
"""A vector must also be nearest to its own of the checked documents, up to this: some models' vectors are all alike."""
_OTHER_ENCODER = "pass the --retriever_model that it was built with, or build it again with --overwrite"


class DenseEngine:
    """Searches a dense index; every document has a score, so an exact index returns `topk` documents for every query.

    Attributes:
        index: what `index.json` says of the index, or would say if there was one.
    """

    def __init__(
        self, index: IndexInfo, source: Source, encoder: Encoder, corpus: Corpus, parameters: Mapping[str, Setting]
    ) -> None:
        info = engine_info(index, **parameters, precision=encoder.precision)
        self.info = replace(info, max_topk=min(info.max_topk, source.most))
        self.index = index
        self.corpus = corpus
        self._source = source
        self._encoder = encoder
        self._threads = faiss.omp_get_max_threads()

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        """See `verl.retrieval.engine.Engine.search`; an error stands for a query that cannot be encoded."""
        check_topk(topk, self.info)
        faiss.omp_set_num_threads(self._threads)  # it holds for the thread that says so, which need not be this one
        try:
            hits = nearest(self._source, self._encoder.encode_queries(queries), topk) if queries else []
        except RetrieverError as error:  # one of them cannot be encoded: the others can
            return [error] if len(queries) == 1 else [self.search([query], topk)[0] for query in queries]
        return [
            best_first(self.corpus, query, hit.rows, hit.scores, topk) for query, hit in zip(queries, hits, strict=True)
        ]

    def close(self) -> None:
        """See `verl.retrieval.engine.Engine.close`."""
        self._source.close()


def index_info(
    corpus: Corpus, retriever_name: str, model: str | None, config: IndexConfig, spec: EncoderSpec
) -> IndexInfo:
    """Return what `index.json` says about the dense index of `corpus` under `config`, but for its files."""
    versions = {"faiss": faiss.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    settings = config.settings(len(corpus)) | spec_settings(spec)
    return IndexInfo(retriever_name, model, corpus.fingerprint, len(corpus), settings, versions)


def index_file(retriever_name: str, kind: str) -> str:
    """Return the published name of an index, for example `e5_Flat.index`."""
    return f"{retriever_name}_{kind}.index"


def describe(path: Path, corpus: Corpus, retriever_name: str, model: str | None) -> IndexInfo:
    """Return what `index.json` would say about a FAISS file that came without one, but for its encoder.

    Whether it belongs to `corpus` is not known yet.

    Args:
        path: the file, or a folder with just one `.index` file.

    Raises:
        DataError: no such file or several, a damaged one, or a kind that is not served.
    """
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            names = ", ".join(item.name for item in found) or "none"
            raise DataError(
                f"{path} holds no index.json, so it is no complete index; expected one .index file in its place, found "
                f"{names}; build the index with `python -m verl.retrieval.build`, or pass the file as --index_path"
            )
        path = found[0]
    index = read_index_file(path)
    settings: dict[str, str | int | float | bool] = {"kind": kind_of(index, path)}
    if isinstance(index, faiss.IndexIVF):
        settings["nlist"] = index.nlist
    files = {path.name: file_mark(path)}
    return IndexInfo(retriever_name, model, corpus.fingerprint, index.ntotal, settings, files=files)


def open_engine(
    folder: Path,
    corpus: Corpus,
    info: IndexInfo,
    model: str | None = None,
    threads: int | None = None,
    search: SearchConfig | None = None,
    encoder: EncoderConfig | None = None,
    encoder_overrides: Mapping[str, Setting] | None = None,
) -> DenseEngine:
    """Memory-map the index in `folder` and load its encoder; see `verl.retrieval.engine.open_index`.

    Raises:
        ConfigError: the encoder cannot be loaded, or is not the one that the index was built with; a search parameter
            that the index does not have; no GPU where one was asked for.
        DataError: the index file is missing, damaged, or not the one that `info` describes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
    search = search or SearchConfig()
    index, info = open_file(folder, corpus, info)
    path = folder / next(iter(info.files))
    kind, nlist = str(info.settings["kind"]), index.nlist if isinstance(index, faiss.IndexIVF) else 0
    parameters = settle(kind, nlist, search, Tuning.load(folder, info.files[path.name]))
    if search.faiss_gpu:
        check_gpus(kind)
    loaded = open_encoder(index, info, corpus, path, model, encoder, encoder_overrides)
    source = open_source(index, parameters)
    if search.faiss_gpu:
        source.close()
        source = gpu_source(index, kind)
    info = replace(info, settings={**info.settings, **spec_settings(loaded.spec)})
    return DenseEngine(info, source, loaded, corpus, {**parameters, "faiss_gpu": search.faiss_gpu})


def open_encoder(
    index: faiss.Index,
    info: IndexInfo,
    corpus: Corpus,
    path: Path,
    model: str | None,
    config: EncoderConfig | None,
    overrides: Mapping[str, Setting] | None,
) -> Encoder:
    """Load the encoder of an index, and check that it makes the vectors which the index holds of `corpus`.

    Raises:
        ConfigError: it cannot be loaded, or is another one.
        DataError: some documents have their vectors and some do not.
    """
    encoder = load_encoder(info.retriever, model or info.model, config, _overrides(info, overrides))
    if index.d != encoder.width:
        raise ConfigError(
            f"index {path} holds vectors of {index.d} numbers, the encoder makes {encoder.width}; {_OTHER_ENCODER}"
        )
    kind = str(info.settings["kind"])
    check_vectors(lambda row, near: stored_vector(index, row, near), kind, encoder, corpus, path)
    return encoder


def _overrides(info: IndexInfo, given: Mapping[str, Setting] | None) -> dict[str, Setting]:
    """Return how the encoder is used: as recorded when the index was built, but for what is given."""
    recorded = recorded_spec(info.settings)
    return {**(asdict(recorded) if recorded != EncoderSpec() else {}), **(given or {})}


def open_file(folder: Path, corpus: Corpus, info: IndexInfo) -> tuple[faiss.Index, IndexInfo]:
    """Memory-map the index file in `folder`; also returns `info` with the file's mark, if it had none.

    Raises:
        DataError: the file is missing, damaged, or not the one that `info` describes.
    """
    kind = str(info.settings.get("kind", "Flat"))
    path = folder / next(iter(info.files), index_file(info.retriever, kind))
    remedy = "build it again with --overwrite"
    index = read_index_file(path)
    mark = file_mark(path)
    if info.files.get(path.name, mark) != mark:
        raise DataError(f"index {path} is damaged: it is not the file that index.json was written for; {remedy}")
    if kind_of(index, path) != kind:
        raise DataError(f"index {path} is damaged: it is {kind_of(index, path)}, index.json says {kind}; {remedy}")
    if index.ntotal != len(corpus):
        raise DataError(
            f"index {path} is damaged, or that of another corpus: it holds {index.ntotal} vectors for {len(corpus)} "
            f"documents; {remedy}"
        )
    return index, replace(info, settings={**info.settings, "kind": kind}, files={path.name: mark})


def open_source(index: faiss.Index, parameters: dict[str, int]) -> Source:
    """Return a mapped index as something that proposes candidates, with its search parameters."""
    if isinstance(index, faiss.IndexFlat):
        return FlatSource(index)
    if isinstance(index, faiss.IndexIVF):
        return ListSource(index, parameters["nprobe"])
    return RowSource(index, parameters.get("ef_search"))


def check_vectors(
    stored: Callable[[int, np.ndarray], np.ndarray | None], kind: str, encoder: Encoder, corpus: Corpus, path: Path
) -> None:
    """Encode a few documents again: only the encoder and the corpus that an index was built from find their vectors.

    Args:
        stored: returns the vector of a row, or None; see `verl.retrieval.dense_search.stored_vector`.

    Raises:
        ConfigError: none of them is found.
        DataError: some are found and some are not, so the corpus is not the one, or not in that order.
    """
    rows = np.unique(np.linspace(0, len(corpus) - 1, _CHECKED).astype(int)).tolist()
    vectors = encoder.encode_passages([corpus[row].contents for row in rows])
    found = [stored(row, vector) for row, vector in zip(rows, vectors, strict=True)]
    cosines = np.array([[_cosine(vector, other) for other in vectors] for vector in found])
    own, least = np.diagonal(cosines), _SAME_CODE if kind == "IVF-PQ" else _SAME_VECTOR
    right = (own >= least) & (own >= cosines.max(axis=1) - _EQUAL)
    wrong = [row for row, is_right in zip(rows, right, strict=True) if not is_right]
    if len(wrong) == len(rows):
        raise ConfigError(
            f"{path} was built with another encoder, or for other documents: its vectors and the encoder's have cosine "
            f"{own.max():.3f} at best, over {len(rows)} documents; expected at least {least}; {_OTHER_ENCODER}"
        )
    if wrong:
        raise DataError(
            f"{path} was built for another corpus, for its documents in another order, or with another encoder: the "
            f"vectors of rows {wrong} are not those of their documents, those of the other {len(rows) - len(wrong)} "
            "checked ones are; pass the corpus that was indexed, and the encoder as it was used"
        )


def _cosine(stored: np.ndarray | None, vector: np.ndarray) -> float:
    if stored is None:
        return 0.0
    return float(stored @ vector / max(float(np.linalg.norm(stored) * np.linalg.norm(vector)), 1e-12))
