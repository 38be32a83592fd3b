"""The service's command line; `add_engine_flags` are also those of `verl.retrieval.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from verl.retrieval.corpus import OnError
from verl.retrieval.encoder_spec import Precision
from verl.retrieval.opening import NAMES, REMOTE, EngineOptions, RerankKind
from verl.retrieval.replay import ReplayMode
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.settings import OnSyntaxError, QuerySyntax
from verl.retrieval.wire import RequestLimits

Add = Callable[..., argparse.Action]

_SERVICE = {
    "topk": "documents per query when a request does not say",
    "host": "address to listen on",
    "port": "0 for any free port",
    "workers": "processes that answer on the port, each with an engine of its own",
    "batch_queries": "most queries that go to the engine at once",
    "batch_window_ms": "how long a batch waits for other requests",
    "drain_s": "how long requests are still accepted after SIGTERM, with /ready at 503",
    "shutdown_timeout_s": "how long requests in flight may take after that",
    "token_env": "environment variable with the bearer token that requests must carry",
}
_LIMITS = {
    "max_queued_queries": "queries that may wait; beyond them requests get 503 with Retry-After",
    "max_connections": "open connections",
    "max_body_mb": "what all bodies on their way may hold together",
    "header_timeout_s": "how long the head of a request may take",
    "body_timeout_s": "how long the body of a request may take",
    "write_timeout_s": "how long a client may take nothing of its answer",
    "keep_alive_s": "how long a connection without a request is kept",
}
_REQUEST = {
    "max_body_bytes": "size of its body",
    "max_queries": "queries",
    "max_query_chars": "characters of a query",
    "max_topk": "documents of a query",
    "max_documents": "topk times the number of queries",
}
_STAGES = {
    "rrf_k": "hybrid: the larger, the less the first ranks stand out",
    "fusion_depth": "hybrid: documents of each part that are fused",
    "rerank_depth": "documents that the cross-encoder orders anew",
    "web_rate": "web: requests in a second, of all workers together",
    "web_pages": "web: most pages of ten results that one query asks for",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser; its help names every flag with its default."""
    parser = argparse.ArgumentParser(prog="python -m verl.retrieval.server", description="Serve a retrieval index.")
    add_engine_flags(parser)
    service = parser.add_argument_group("service").add_argument
    _add_numbers(service, ServerConfig, _SERVICE)
    _add_cache(service)
    _add_numbers(parser.add_argument_group("limits of one worker").add_argument, ServerConfig, _LIMITS)
    _add_numbers(parser.add_argument_group("limits of one request").add_argument, RequestLimits, _REQUEST)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser, name_required: bool = True) -> None:
    """Add the flags that say which engine is opened; `engine_options` reads them."""
    _add_engine(parser.add_argument_group("engine").add_argument, name_required)
    _add_dense(parser.add_argument_group("dense index").add_argument)
    stages = parser.add_argument_group("lucene, fusion, rerank, web").add_argument
    _add_numbers(stages, EngineOptions, _STAGES)
    _add_stages(stages)


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """Return what the flags of `add_engine_flags` say.

    Raises:
        ConfigError: they do not go together.
    """
    lists = {name: tuple(getattr(args, name)) for name in ("index_path", "encoder_spec", "fuse_with", "fusion_weights")}
    return EngineOptions(**{**_given(EngineOptions, args), **lists})


def configs(args: argparse.Namespace) -> tuple[ServerConfig, EngineOptions]:
    """Return what the flags say.

    Raises:
        ConfigError: they do not go together.
    """
    cache = CacheConfig(args.cache_mb, args.cache_file, args.cache_disk_mb)
    limits = RequestLimits(**_given(RequestLimits, args))
    server = ServerConfig(**_given(ServerConfig, args), limits=limits, cache=cache)
    return server, engine_options(args)


def _add_engine(add: Add, name_required: bool) -> None:
    add("--retriever_name", required=name_required, help=f"one of {', '.join(NAMES)}")
    add(
        "--index_path",
        type=Path,
        nargs="+",
        default=[],
        help="folder that verl.retrieval.build wrote, or a file in it, or a published index file; several for hybrid",
    )
    add("--corpus_path", type=Path, help="corpus that the index was built from")
    add("--corpus_cache", type=Path, help="folder of the converted corpus (default: CORPUS_PATH.cache)")
    add(
        "--on-error",
        "--on_error",
        choices=get_args(OnError),
        default=_default(EngineOptions, "on_error"),
        help="what to do about a malformed line of the corpus (default: %(default)s)",
    )
    add("--threads", type=int, help="CPU threads of a search (default: the process's CPUs, shared by the workers)")


def _add_dense(add: Add) -> None:
    add("--retriever_model", help="encoder: local folder or Hugging Face name (default: the index's)")
    add(
        "--encoder_spec",
        action="append",
        default=[],
        metavar="FILE|KEY=VALUE",
        help="how the encoder is used, where it differs from the index's; may be repeated",
    )
    add("--device", help="torch device of the encoder (default: a GPU if there is one)")
    add(
        "--dtype",
        choices=get_args(Precision),
        default=_default(EngineOptions, "dtype"),
        help="in which numbers the encoder computes (default: %(default)s)",
    )
    add("--batch_tokens", type=int, help="most tokens of the encoder's forward pass (default: what suits the device)")
    add("--nprobe", type=int, help="clusters of an IVF index that are searched (default: as tuned)")
    add("--ef_search", type=int, help="candidates that an HNSW search keeps (default: as tuned)")
    add("--faiss_gpu", action="store_true", help="search on all visible GPUs, in half precision")


def _add_stages(add: Add) -> None:
    add("--query_syntax", choices=get_args(QuerySyntax), help="lucene (default: the index's)")
    add("--on_syntax_error", choices=get_args(OnSyntaxError), help="lucene: what a malformed Boolean query gets")
    add("--lucene_k1", type=float, help="lucene: BM25's k1 (default: the index's)")
    add("--lucene_b", type=float, help="lucene: BM25's b (default: the index's)")
    add(
        "--fuse_with",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"hybrid: what is searched beside the indexes, some of {', '.join(REMOTE)}",
    )
    add(
        "--fusion_weights",
        type=float,
        nargs="+",
        default=[],
        metavar="WEIGHT",
        help="hybrid: one for each --index_path, then one for each --fuse_with (default: all 1)",
    )
    add(
        "--require_all",
        action=argparse.BooleanOptionalAction,
        default=_default(EngineOptions, "require_all"),
        help="hybrid: whether a query fails where one part fails, or else is answered by the others",
    )
    add("--rerank_model", help="model that orders the best documents anew; with it POST /rerank is served too")
    add("--rerank_kind", choices=get_args(RerankKind), default=_default(EngineOptions, "rerank_kind"), help="its kind")
    add("--web_base_url", help="web: another host that speaks the service's format; colbert_api: the search")
    add("--web_cache", type=Path, help="web: file of kept answers")
    add(
        "--web_cache_mode",
        choices=get_args(ReplayMode),
        help="web: whether that file is used, and the service at all (default: record if a file is named, else off)",
    )


def _add_cache(add: Add) -> None:
    add("--cache_file", type=Path, help="file of kept results, shared by the workers (default: none)")
    for flag, name, meaning in (
        ("cache_mb", "memory_mb", "results kept in memory, of each worker; 0 for none"),
        ("cache_disk_mb", "disk_mb", "size of CACHE_FILE above which its oldest results are dropped"),
    ):
        value = _default(CacheConfig, name)
        add(f"--{flag}", type=float, default=value, help=f"{meaning} (default: {value:g})")


def _add_numbers(add: Add, kind: type, meanings: dict[str, str]) -> None:
    """Add a flag for each of these fields, of its default's type and with its default."""
    for name, meaning in meanings.items():
        value = _default(kind, name)
        shown = value if value != "" else "none"
        add(f"--{name}", type=type(value), default=value, help=f"{meaning} (default: {shown})")


def _default(kind: type, name: str) -> Any:
    return next(item.default for item in fields(kind) if item.name == name)


def _given(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    return {item.name: getattr(args, item.name) for item in fields(kind) if item.name in args}
