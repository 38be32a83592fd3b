"""From options to an engine: opens corpus and indexes, fuses them, puts a rerank stage on top, or searches the web."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from verl.errors import ConfigError, DataError
from verl.retrieval.corpus import Corpus, OnError
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, Precision, read_overrides
from verl.retrieval.engine import INFO_NAME, Engine, IndexInfo, as_live, check_info, open_index
from verl.retrieval.replay import ReplayMode
from verl.retrieval.search_config import SearchConfig
from verl.retrieval.settings import RETRIEVERS, LuceneSearch, OnSyntaxError, QuerySyntax

if TYPE_CHECKING:
    from verl.retrieval.rerank import Reranker

HYBRID = "hybrid"
WEB = ("serper", "serpapi", "google_cse")
COLBERT_API = "colbert_api"
RerankKind = Literal["cross_encoder", "late_interaction"]
REMOTE = (*WEB, COLBERT_API)
NAMES = (*RETRIEVERS, HYBRID, *REMOTE)


_OF_DENSE = (
    "retriever_model",
    "encoder_spec",
    "device",
    "dtype",
    "batch_tokens",
    "nprobe",
    "ef_search",
    "faiss_gpu",
)
_CONCERNS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("a dense index", tuple(ENCODERS), _OF_DENSE),
    ("a Lucene index", ("lucene",), ("query_syntax", "on_syntax_error", "lucene_k1", "lucene_b")),
    ("a web service", REMOTE, ("web_cache", "web_cache_mode", "web_pages", "web_base_url")),
    ("a hybrid", (HYBRID,), ("fuse_with", "fusion_weights", "require_all", "rrf_k", "fusion_depth")),
)
"""Options that only some retrievers have: what these are, their names, the options."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine is opened.

    Attributes:
        retriever_name: an index's retriever, `hybrid`, a web service, or `colbert_api` for a server of ColBERT's shape.
        index_path: the index; any number for `hybrid`, none for the web and other servers.
        corpus_path: what was indexed; None for the web and other servers, and for a `hybrid` of these alone.
        corpus_cache: folder of the converted corpus, beside the corpus when None.
        on_error: what to do about a malformed line of the corpus.
        threads: CPU threads of a search, what the process may use when None.
        retriever_model: encoder in place of the index's own.
        encoder_spec: what else differs from it; see `verl.retrieval.encoder_spec.read_overrides`.
        device: torch device of the encoder, a GPU if there is one when None.
        dtype: in which numbers the encoder computes.
        batch_tokens: the most tokens of its forward pass, what suits the device when None.
        nprobe: see `verl.retrieval.search_config.SearchConfig`, as for the next two.
        ef_search: as above.
        faiss_gpu: as above.
        query_syntax: of a Lucene index, that of the index when None.
        on_syntax_error: of a Lucene index, that of the index when None.
        lucene_k1: of a Lucene index, that of the index when None.
        lucene_b: as above.
        fuse_with: web services and other servers that a `hybrid` asks beside its indexes.
        fusion_weights: of the rankings of a `hybrid`, in the order of `index_path` and then of `fuse_with`; all 1 when
            empty.
        require_all: see `verl.retrieval.fusion`, as for the next two.
        rrf_k: as above.
        fusion_depth: as above.
        rerank_model: cross-encoder that orders the best documents anew, None for no such stage.
        rerank_kind: what that model is; `late_interaction` is ColBERT's (`verl.retrieval.late_interaction`).
        rerank_depth: how many it orders.
        web_cache: file of kept answers.
        web_cache_mode: see `verl.retrieval.replay.ReplayMode`; `record` when None and a file is named, else `off`.
        web_rate: requests in a second, of all workers together.
        web_pages: most pages of ten results that one query asks for.
        web_base_url: another host that speaks the service's format; of `colbert_api`, the address of its search.
    """

    retriever_name: str
    index_path: tuple[Path, ...] = ()
    corpus_path: Path | None = None
    corpus_cache: Path | None = None
    on_error: OnError = "raise"
    threads: int | None = None
    retriever_model: str | None = None
    encoder_spec: tuple[str, ...] = ()
    device: str | None = None
    dtype: Precision = "auto"
    batch_tokens: int | None = None
    nprobe: int | None = None
    ef_search: int | None = None
    faiss_gpu: bool = False
    query_syntax: QuerySyntax | None = None
    on_syntax_error: OnSyntaxError | None = None
    lucene_k1: float | None = None
    lucene_b: float | None = None
    fuse_with: tuple[str, ...] = ()
    fusion_weights: tuple[float, ...] = ()
    require_all: bool = True
    rrf_k: int = 60
    fusion_depth: int = 100
    rerank_model: str | None = None
    rerank_kind: RerankKind = "cross_encoder"
    rerank_depth: int = 50
    web_cache: Path | None = None
    web_cache_mode: ReplayMode | None = None
    web_rate: float = 5.0
    web_pages: int = 1
    web_base_url: str | None = None

    def __post_init__(self) -> None:
        name, count = self.retriever_name, len(self.index_path)
        if name not in NAMES:
            raise ConfigError(f"retriever_name={name!r} is unknown; expected one of {', '.join(NAMES)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}; expected at least 1, or none given to use what the process may")
        if name in REMOTE and (count or self.corpus_path):
            where = "the web" if name in WEB else "another server"
            raise ConfigError(f"retriever_name={name} searches {where}; leave --index_path and --corpus_path out")
        needs_corpus = bool(count) if name == HYBRID and self.fuse_with else name not in (*REMOTE, "lucene")
        if needs_corpus and self.corpus_path is None:
            raise ConfigError(f"retriever_name={name} needs --corpus_path, the corpus that was indexed")
        if name in RETRIEVERS and count != 1:
            raise ConfigError(f"retriever_name={name} came with {count} --index_path; expected one")
        for option, known in (("on_error", OnError), ("web_cache_mode", ReplayMode), ("rerank_kind", RerankKind)):
            value = getattr(self, option)
            if value not in get_args(known) and not (option == "web_cache_mode" and value is None):
                raise ConfigError(f"{option}={value!r}; expected one of {', '.join(get_args(known))}")
        if name == HYBRID:
            self._check_fusion()
        else:
            self.check_concerns((name,))

    def _check_fusion(self) -> None:
        indexes, others = len(self.index_path), len(self.fuse_with)
        if indexes + others < 2:
            beside = f" and {others} --fuse_with" if others else ""
            raise ConfigError(
                f"retriever_name=hybrid came with {indexes} --index_path{beside}; expected at least two, --fuse_with "
                "included"
            )
        if not set(self.fuse_with) <= set(REMOTE) or len(set(self.fuse_with)) < others:
            raise ConfigError(f"fuse_with={' '.join(self.fuse_with)}; expected some of {', '.join(REMOTE)}, each once")
        if self.fusion_weights and len(self.fusion_weights) != indexes + others:
            raise ConfigError(
                f"{len(self.fusion_weights)} --fusion_weights came for {indexes} --index_path and {others} "
                "--fuse_with; expected one for each, in that order"
            )
        if not indexes and self.corpus_path is not None:
            raise ConfigError("retriever_name=hybrid came with --corpus_path but no --index_path; leave it out")
        if others > 1 and self.web_base_url is not None:
            raise ConfigError(f"web_base_url is one service's, and {others} --fuse_with came; leave --web_base_url out")

    def check_concerns(self, names: Sequence[str]) -> None:
        """Refuse options that none of the opened retrievers has, rather than search otherwise than was asked for.

        Args:
            names: of what is opened; of a `hybrid`, its parts.

        Raises:
            ConfigError: names the option.
        """
        usual = {item.name: item.default for item in fields(self)}
        for kind, retrievers, options in _CONCERNS:
            if not {self.retriever_name, *names}.isdisjoint(retrievers):
                continue
            for option in options:
                value = getattr(self, option)
                if value != usual[option] and not (option == "device" and self.rerank_model):
                    raise ConfigError(
                        f"{option}={value!r} concerns {kind}, and none is opened ({', '.join(names)}); leave "
                        f"--{option} out, or pass such a retriever"
                    )

    @property
    def replay_mode(self) -> ReplayMode:
        """What is done with the file of kept answers."""
        return self.web_cache_mode or ("off" if self.web_cache is None else "record")


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine that can be searched.

    Attributes:
        cacheable: whether its results stay true, so that they may be kept.
        reranker: what `POST /rerank` uses, None where there is no rerank stage.
    """

    engine: Engine
    cacheable: bool = True
    reranker: Reranker | None = None


def open_engine(options: EngineOptions) -> Opened:
    """Open what the options say.

    Raises:
        ConfigError: an option does not fit the index, or a model, a key or a device is missing.
        DataError: the corpus or an index is missing or damaged, or they do not belong together.
    """
    name = options.retriever_name
    engine = _remote(options, name) if name in REMOTE else _local(options)
    # Which engine was well decides what a hybrid that needs not all of them finds.
    opened = Opened(engine, as_live(engine) is None and options.require_all)
    if options.rerank_model is None:
        return opened
    with ExitStack() as stack:
        stack.callback(opened.engine.close)
        reranking = _reranking(opened, options, options.rerank_model)
        stack.pop_all()
    return reranking


# The modules below are imported where they are used: each brings libraries that take seconds, and no server needs all.


def _local(options: EngineOptions) -> Engine:
    path, corpus = options.corpus_path, None
    if path is not None:
        corpus = Corpus.open(path, options.corpus_cache, options.on_error)
    if options.retriever_name != HYBRID:
        return _index(options, options.index_path[0], options.retriever_name, options.retriever_model, corpus)
    from verl.retrieval.fusion import HybridEngine

    indexes = [partial(_index, options, path, name, model, corpus) for path, name, model in _parts(options)]
    others = [partial(_remote, options, name) for name in options.fuse_with]
    weights = options.fusion_weights or None
    return HybridEngine.open([*indexes, *others], weights, options.rrf_k, options.fusion_depth, options.require_all)


def _parts(options: EngineOptions) -> list[tuple[Path, str, str | None]]:
    """Return path, retriever and encoder of each index; the retriever stands in the index itself."""
    names = [_retriever_of(path) for path in options.index_path]
    options.check_concerns((*names, *options.fuse_with))
    dense = [name for name in names if name in ENCODERS]
    if options.retriever_model is not None and len(dense) != 1:
        raise ConfigError(
            f"retriever_model={options.retriever_model!r} came with {len(dense)} indexes that have an encoder; "
            "expected one such index, or no --retriever_model"
        )
    models = [options.retriever_model if name in ENCODERS else None for name in names]
    return list(zip(options.index_path, names, models, strict=True))


def _retriever_of(path: Path) -> str:
    """Return the retriever of an index; one that came without `index.json` is taken for Lucene's, or refused.

    Raises:
        DataError: there is no index, or a bare FAISS file, which does not say whose vectors it holds.
    """
    if not path.exists():
        raise DataError(f"index {path}: no such file or folder; build it with `python -m verl.retrieval.build`")
    folder = _folder(path)
    if not (folder / INFO_NAME).exists():
        if any(folder.glob("segments_*")):
            return "lucene"
        if path.is_file() or any(path.glob("*.index")):
            raise DataError(
                f"index {path} has no {INFO_NAME} to say which encoder it is of, which a hybrid has to know; run "
                "`python -m verl.retrieval.build import` with it, its --corpus_path and --retriever_name first"
            )
    return IndexInfo.load(folder).retriever


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _index(options: EngineOptions, path: Path, name: str, model: str | None, corpus: Corpus | None) -> Engine:
    if name == "lucene":
        return _lucene(options, path, corpus)
    assert corpus is not None  # the options were checked
    if name not in ENCODERS:
        return open_index(path, corpus, name, threads=options.threads)
    search = SearchConfig(options.nprobe, options.ef_search, options.faiss_gpu)
    encoder = EncoderConfig(options.device, batch_tokens=options.batch_tokens, dtype=options.dtype)
    overrides = read_overrides(options.encoder_spec)
    return open_index(path, corpus, name, model, options.threads, search, encoder, overrides)


def _lucene(options: EngineOptions, path: Path, corpus: Corpus | None) -> Engine:
    from verl.retrieval import lucene

    folder = _folder(path)
    info = IndexInfo.load(folder) if (folder / INFO_NAME).exists() else lucene.describe(folder, corpus)
    if corpus is not None:
        check_info(info, path, corpus, "lucene")
    elif info.retriever != "lucene":
        raise ConfigError(
            f"index {path} was built for retriever {info.retriever!r}; pass --retriever_name {info.retriever}"
        )
    search = LuceneSearch(options.lucene_k1, options.lucene_b, options.query_syntax, options.on_syntax_error)
    return lucene.open_engine(folder, corpus, info, search, options.threads)


def _remote(options: EngineOptions, name: str) -> Engine:
    return _colbert_api(options) if name == COLBERT_API else _web(options, name)


def _colbert_api(options: EngineOptions) -> Engine:
    from verl.retrieval import colbert_client

    config = colbert_client.ColbertApiConfig(options.web_base_url, options.web_cache, options.replay_mode)
    return colbert_client.open_engine(config)


def _web(options: EngineOptions, provider: str) -> Engine:
    from verl.retrieval import web
    from verl.retrieval.web_http import FetchConfig

    config = web.WebConfig(
        provider=provider,
        base_url=options.web_base_url,
        pages=options.web_pages,
        cache=options.web_cache,
        cache_mode=options.replay_mode,
        http=FetchConfig(rate=options.web_rate),
    )
    return web.open_engine(config)


def _reranking(opened: Opened, options: EngineOptions, model: str) -> Opened:
    from verl.retrieval.rerank import CrossEncoderReranker, RerankEngine

    if options.rerank_kind == "late_interaction":
        from verl.retrieval.late_interaction import LateInteractionReranker

        reranker: Reranker = LateInteractionReranker(model, options.device)
    else:
        reranker = CrossEncoderReranker(model, options.device)
    return Opened(RerankEngine(opened.engine, reranker, depth=options.rerank_depth), opened.cacheable, reranker)
