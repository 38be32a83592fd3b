"""The flags of `python -m verl.retrieval.build`; those of the published index builder work under their names."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import OnError
from verl.retrieval.encoder_spec import EncoderConfig, Pooling, Precision, Setting, read_overrides
from verl.retrieval.index_kinds import KINDS, IndexConfig, adjusted, parse_kind
from verl.retrieval.settings import RETRIEVERS, BM25Config, LuceneConfig

Flags = TypeVar("Flags", BM25Config, LuceneConfig)
Group = argparse._ArgumentGroup


def build_options(args: argparse.Namespace) -> BuildOptions:
    """Return what the flags of `build_parser` ask for.

    Raises:
        ConfigError: a value that is not allowed.
    """
    return BuildOptions(
        model=args.retriever_model,
        encoder=EncoderConfig(
            args.device, args.batch_size, args.batch_tokens, "float16" if args.use_fp16 else args.dtype
        ),
        encoder_overrides=_encoder_overrides(args),
        bm25=_from_flags(BM25Config, "bm25", args),
        lucene=_from_flags(LuceneConfig, "lucene", args),
        index=_index_config(args),
        embedding_path=args.embedding_path,
        save_embedding=args.save_embedding,
        target_recall=args.target_recall,
        overwrite=args.overwrite,
    )


def _encoder_overrides(args: argparse.Namespace) -> dict[str, Setting]:
    """The published flags for length and pooling are two more of the encoder's settings."""
    overrides = read_overrides(args.encoder_spec)
    if args.max_length is not None:
        overrides["max_length"] = args.max_length
    if args.pooling_method is not None:
        overrides["pooling"] = args.pooling_method
    return overrides


def _index_config(args: argparse.Namespace) -> IndexConfig:
    numbers = ("nlist", "pq_m", "hnsw_m", "ef_construction", "train_size", "seed")
    return adjusted(parse_kind(args.index_kind), **{name: getattr(args, name) for name in numbers})


def _from_flags(kind: type[Flags], prefix: str, args: argparse.Namespace) -> Flags:
    return kind(**{item.name: getattr(args, f"{prefix}_{item.name}") for item in fields(kind)})


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of a build's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.retrieval.build [build|plan|tune|import]",
        description="Build a retrieval index. `plan`, `tune` and `import` have a --help of their own.",
    )
    parser.add_argument("--retriever_name", "--retrieval_method", required=True, help=f"one of {', '.join(RETRIEVERS)}")
    add_corpus_flags(parser)
    parser.add_argument("--save_dir", required=True, help="folder of the index")
    parser.add_argument("--overwrite", action="store_true", help="replace another index in SAVE_DIR")
    _add_encoder_flags(parser.add_argument_group("encoder"))
    _add_index_flags(parser.add_argument_group("dense index"))
    _add_fields(parser.add_argument_group("bm25"), "bm25", BM25Config())
    _add_fields(parser.add_argument_group("lucene"), "lucene", LuceneConfig())
    return parser


def add_corpus_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that say which corpus."""
    parser.add_argument(
        "--corpus_path", "--corpus", required=required, help="jsonl, tsv or BEIR folder, plain or gzipped"
    )
    parser.add_argument("--corpus_cache", help="folder of the converted corpus (default: CORPUS_PATH.cache)")
    parser.add_argument(
        "--on_error", "--on-error", choices=get_args(OnError), default="raise", help="what to do about a bad line"
    )


def add_encoder_choice(group: Group | argparse.ArgumentParser) -> None:
    """Add the flags that say which encoder, and where it runs."""
    group.add_argument("--retriever_model", "--model_path", help="local folder or Hugging Face name")
    group.add_argument(
        "--encoder_spec",
        action="append",
        default=[],
        metavar="FILE|KEY=VALUE",
        help="how the encoder is used, where it differs from the named one; may be repeated",
    )
    group.add_argument("--device", help="torch device of the encoder (default: a GPU if there is one)")


def _add_encoder_flags(group: Group) -> None:
    encoder = EncoderConfig()
    add_encoder_choice(group)
    group.add_argument("--max_length", type=int, help="tokens of a passage that are read (default: the encoder's)")
    group.add_argument("--pooling_method", choices=get_args(Pooling), help="(default: the encoder's)")
    group.add_argument("--dtype", choices=get_args(Precision), default=encoder.dtype, help="(default: %(default)s)")
    group.add_argument("--use_fp16", action="store_true", help="--dtype float16")
    group.add_argument(
        "--batch_size", type=int, default=encoder.batch_size, help="texts of a forward pass (default: %(default)s)"
    )
    group.add_argument("--batch_tokens", type=int, help="tokens of a forward pass (default: what suits the device)")
    group.add_argument("--embedding_path", type=Path, help="raw float32 vectors to use in place of encoding")
    group.add_argument("--save_embedding", action="store_true", help="keep the vectors in SAVE_DIR.vectors")


def _add_index_flags(group: Group) -> None:
    config = IndexConfig()
    group.add_argument(
        "--index_kind",
        "--faiss_type",
        default=config.kind,
        help=f"one of {', '.join(KINDS)}, or FAISS's IVF4096,SQ8 and the like (default: %(default)s)",
    )
    for name, meaning in (
        ("nlist", "clusters of an IVF index (default: about 4 * sqrt(documents))"),
        ("pq_m", "bytes per vector of IVF-PQ (default: a quarter of the width)"),
        ("hnsw_m", f"links per vector of HNSW (default: {config.hnsw_m})"),
        ("ef_construction", f"candidates when HNSW links a vector (default: {config.ef_construction})"),
        ("train_size", "vectors that clusters and codes are trained on (default: 40 per cluster)"),
        ("seed", f"of the training (default: {config.seed})"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)
    group.add_argument(
        "--target_recall", type=float, help="tune the index for this recall@10 when it is built (see `build tune`)"
    )


def _add_fields(group: Group, prefix: str, defaults: BM25Config | LuceneConfig) -> None:
    """Add a flag `--{prefix}_{field}` for every field of a configuration; `_from_flags` reads them."""
    hints = get_type_hints(type(defaults))
    for item in fields(defaults):
        default, kind = getattr(defaults, item.name), hints[item.name]
        options: dict[str, Any] = {"type": type(default), "default": default, "help": "(default: %(default)s)"}
        if kind is bool:
            options["type"] = _boolean
        elif get_args(kind):
            options["choices"] = get_args(kind)
        group.add_argument(f"--{prefix}_{item.name}", **options)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected true or false")
    return text.lower() == "true"
