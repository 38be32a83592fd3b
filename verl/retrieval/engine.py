"""What an engine is, what an index says about itself, and how an index becomes an engine again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, cast

from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, Setting
from verl.retrieval.search_config import SearchConfig
from verl.retrieval.settings import check_retriever
from verl.typed import Decoder
from verl.types import SearchResult

logger = logging.getLogger(__name__)

INFO_NAME = "index.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says about itself; answered by `/info`.

    Attributes:
        name: the retriever's name, for example `"bm25"`.
        documents: size of what is searched, None where nobody knows it (the web).
        max_topk: the largest `topk` that can be asked for.
        corpus: fingerprint of the corpus, empty where there is none.
        fingerprint: of everything that decides a result: corpus, index, encoder and search settings. Two engines with
            one fingerprint answer alike, so it keys the caches of results.
        details: more to show, for example the kind of index and the model.
    """

    name: str
    documents: int | None
    max_topk: int
    corpus: str
    fingerprint: str
    details: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


class Engine(Protocol):
    """Something that can be searched. Calls are blocking and never concurrent; the server sees to that."""

    @property
    def info(self) -> EngineInfo:
        """What this is; constant over the engine's life."""
        ...

    def search(self, queries: Sequence[str], topk: int) -> Sequence[SearchResult | RetrieverError]:
        """Return one result per query, in order, each with at most `topk` documents, best first.

        Documents with equal scores come in the order of their ids, so the result for a smaller `topk` is the head of
        the result for a larger one, and no result depends on the other queries of the call. An error in place of a
        result concerns that query alone; only engines that ask other services have a use for it.

        Raises:
            RetrieverError: `topk` is not between 1 and `info.max_topk`.
        """
        ...

    def close(self) -> None:
        """Release files, threads and connections; the engine cannot be used afterwards."""
        ...


class LiveEngine(Engine, Protocol):
    """An engine that asks services whose answers take their time and change; it also answers single queries.

    The server asks it for every query as it comes, so that one that hangs keeps no other waiting, and keeps no result.
    """

    @property
    def live(self) -> bool:
        """Whether that is so; not where every answer comes from a file, or every part is an index."""
        ...

    async def answer(self, query: str, topk: int) -> SearchResult | RetrieverError:
        """Return what `search` would for one query; calls are concurrent, from one event loop.

        A call that is cancelled is given up, at the service too where it was not sent yet.
        """
        ...


def as_live(engine: Engine) -> LiveEngine | None:
    """Return an engine that has to be asked for each query on its own, None for any other."""
    return cast(LiveEngine, engine) if getattr(engine, "live", False) else None


def digest(*parts: object) -> str:
    """Return a sha256 of JSON values, for an engine's fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """The `index.json` of an index: what it is, and what it was built from.

    Attributes:
        retriever: one of `verl.retrieval.settings.RETRIEVERS`.
        model: the encoder that was asked for, None for the retriever's own default (and for BM25).
        fingerprint: of the corpus that was indexed.
        documents: number of documents in the index.
        settings: the engine's own configuration, so that queries are treated as the documents were.
        built_with: versions of the libraries that wrote the files, for the reader of an old index.
        files: names of index files with their marks (`verl.retrieval.file_mark.file_mark`), so that a file that was
            cut short, damaged or exchanged is known; empty where nothing was recorded.
    """

    retriever: str
    model: str | None
    fingerprint: str
    documents: int
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    built_with: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    def save(self, folder: Path) -> None:
        """Write `index.json` into the folder of the index, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary = folder / f".{INFO_NAME}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
            os.replace(temporary, folder / INFO_NAME)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> IndexInfo:
        """Read `index.json`.

        Raises:
            DataError: it is missing, malformed, or of another format.
        """
        path = folder / INFO_NAME
        remedy = "build the index with `python -m verl.retrieval.build`"
        try:
            info = Decoder(error=DataError).decode(cls, json.loads(path.read_text("utf-8")))
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no {INFO_NAME}, so it is no complete index; {remedy}") from error
        except (OSError, ValueError, DataError) as error:
            raise DataError(f"{path} cannot be read ({error}); {remedy} --overwrite") from error
        if info.format != _FORMAT:
            raise DataError(f"{path} has format {info.format}, expected {_FORMAT}; {remedy} --overwrite")
        return info

    def same_as(self, other: IndexInfo) -> bool:
        """Whether both describe the same index, whichever library versions wrote it."""
        mine = (self.retriever, self.model, self.fingerprint, self.documents, dict(self.settings))
        return mine == (other.retriever, other.model, other.fingerprint, other.documents, dict(other.settings))


def engine_info(info: IndexInfo, **details: str | int | float | bool | None) -> EngineInfo:
    """Return what an engine over one index says about itself; `details` are the settings of its searches."""
    known = {"model": info.model, **info.settings, **details}
    identity = digest(info.retriever, info.model, info.fingerprint, known, dict(info.files))
    return EngineInfo(info.retriever, info.documents, info.documents, info.fingerprint, identity, known)


def open_index(
    index_path: str | Path,
    corpus: Corpus,
    retriever_name: str,
    model: str | None = None,
    threads: int | None = None,
    search: SearchConfig | None = None,
    encoder: EncoderConfig | None = None,
    encoder_overrides: Mapping[str, Setting] | None = None,
) -> Engine:
    """Load an index and check that it belongs to this corpus and retriever.

    Args:
        index_path: the folder that `build` wrote, or a file in it; or a bare FAISS file as published, or a folder with
            just one, of which the vectors of a few documents are checked.
        model: encoder to use in place of the one the index was built with, for example the same model under another
            path; an encoder that produces other vectors is refused.
        threads: CPU threads of a search; what the process may use when None.
        search: how a dense index is searched.
        encoder: how the encoder of a dense index runs.
        encoder_overrides: fields of `EncoderSpec` to use in place of those that the index was built with; see
            `verl.retrieval.encoder_spec.read_overrides`.

    Raises:
        ConfigError: unknown retriever, `threads` below 1, search parameters that the index does not have, options of a
            dense index for another one, no GPU where one was asked for, or an index built by another retriever or
            encoder.
        DataError: no complete index there, a damaged one, or one that was built for another corpus.
    """
    check_retriever(retriever_name)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}; expected at least 1, or none given to use what the process may")
    path = Path(index_path)
    if not path.exists():
        raise DataError(f"index {path}: no such file or folder; build it with `python -m verl.retrieval.build`")
    folder = path if path.is_dir() else path.parent
    info = IndexInfo.load(folder) if (folder / INFO_NAME).exists() else _bare(path, corpus, retriever_name, model)
    check_info(info, path, corpus, retriever_name)
    if info.retriever not in ENCODERS:
        _refuse_dense(info.retriever, search, encoder, encoder_overrides, model)
    # Imported here and below: torch, transformers and Java take seconds, and no index needs all of them.
    if info.retriever == "bm25":
        from verl.retrieval import bm25

        return bm25.open_engine(folder, corpus, info)
    if info.retriever == "lucene":
        from verl.retrieval import lucene

        return lucene.open_engine(folder, corpus, info, threads=threads)
    from verl.retrieval import dense

    return dense.open_engine(folder, corpus, info, model, threads, search, encoder, encoder_overrides)


def _refuse_dense(
    retriever: str,
    search: SearchConfig | None,
    encoder: EncoderConfig | None,
    encoder_overrides: Mapping[str, Setting] | None,
    model: str | None,
) -> None:
    """Refuse what only a dense index has, rather than search otherwise than was asked for."""
    given = {
        "model": model,
        "search": None if search == SearchConfig() else search,
        "encoder": None if encoder == EncoderConfig() else encoder,
        "encoder_overrides": encoder_overrides or None,
    }
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{option}={value!r} concerns a dense index, and this one is {retriever}'s; leave {option} out, or "
                "pass a dense index"
            )


def _bare(path: Path, corpus: Corpus, retriever_name: str, model: str | None) -> IndexInfo:
    """Return what is known of an index that came without `index.json`.

    Raises:
        DataError: it cannot be an index of this retriever.
    """
    folder = path if path.is_dir() else path.parent
    if retriever_name == "lucene":
        from verl.retrieval import lucene

        return lucene.describe(folder, corpus)
    if retriever_name not in ENCODERS:
        return IndexInfo.load(folder)
    from verl.retrieval import dense

    info = dense.describe(path, corpus, retriever_name, model)
    logger.warning(
        "%s has no %s, so only a few of its vectors can be checked against %s; `python -m verl.retrieval.build import` "
        "records which corpus it belongs to",
        path,
        INFO_NAME,
        corpus.path,
    )
    return info


def check_info(info: IndexInfo, path: Path, corpus: Corpus, retriever_name: str) -> None:
    """Refuse an index that is not the one asked for.

    Args:
        path: where it was asked for: its folder, or a file there.

    Raises:
        ConfigError: it was built for another retriever.
        DataError: it was built for another corpus, or describes another file than `path`.
    """
    if info.retriever != retriever_name:
        raise ConfigError(
            f"index {path} was built for retriever {info.retriever!r}, but retriever_name={retriever_name!r} was "
            f"asked for; pass --retriever_name {info.retriever} or another --index_path"
        )
    if info.fingerprint != corpus.fingerprint:
        raise DataError(
            f"index {path} was built for another corpus: fingerprint {info.fingerprint[:12]} with {info.documents} "
            f"documents, but {corpus.path} has fingerprint {corpus.fingerprint[:12]} with {len(corpus)} documents; "
            "pass that corpus or build the index again"
        )
    if path.suffix == ".index" and info.files and path.name not in info.files:
        raise DataError(
            f"the {INFO_NAME} beside index {path} describes {', '.join(info.files)}; pass that file, or move the other "
            "one to a folder of its own"
        )


def check_topk(topk: int, info: EngineInfo) -> None:
    """Refuse a `topk` that the engine cannot serve.

    Raises:
        RetrieverError: `topk` is not between 1 and `info.max_topk`.
    """
    if topk < 1:
        raise RetrieverError(f"topk={topk}; expected at least 1")
    if topk > info.max_topk:
        raise RetrieverError(f"topk={topk} exceeds {extent(info)}; lower topk")


def extent(info: EngineInfo) -> str:
    """Say what bounds `topk`, for messages."""
    if info.documents == info.max_topk:
        return f"the corpus's {info.documents} documents"
    return f"{info.name}'s most, {info.max_topk} documents"
