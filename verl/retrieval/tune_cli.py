"""`python -m verl.retrieval.build tune`: choose how an index is searched, by measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import torch

from verl.errors import DataError
from verl.retrieval.build_flags import add_corpus_flags, add_encoder_choice
from verl.retrieval.collection import read_queries
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import check_vectors, open_encoder, open_file
from verl.retrieval.dense_build import vectors_folder
from verl.retrieval.encoder import Encoder
from verl.retrieval.encoder_spec import EncoderConfig, read_overrides
from verl.retrieval.engine import INFO_NAME, IndexInfo, check_info
from verl.retrieval.tune import TuneConfig, sample_queries, table, tune
from verl.retrieval.vectors import open_embeddings, open_vectors


def run(arguments: Sequence[str]) -> None:
    """Tune an index as the command line says, and write the table of what was measured to standard output.

    Raises:
        ConfigError: the encoder cannot be loaded, or is not the one that the index was built with.
        DataError: the index is damaged, or of another corpus; or no value reaches the target.
    """
    args = _parser().parse_args(arguments)
    config = TuneConfig(args.target_recall, args.k, args.sample, args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
        faiss.omp_set_num_threads(args.threads)
    path = Path(args.index_path)
    folder = path if path.is_dir() else path.parent
    if not (folder / INFO_NAME).is_file():
        raise DataError(f"{folder} holds no {INFO_NAME}; write it with `python -m verl.retrieval.build import` first")
    corpus = Corpus.open(args.corpus_path, args.corpus_cache, args.on_error)
    info = IndexInfo.load(folder)
    check_info(info, path, corpus, info.retriever)
    index, info = open_file(folder, corpus, info)
    overrides = read_overrides(args.encoder_spec)
    encoder = open_encoder(index, info, corpus, path, args.retriever_model, EncoderConfig(args.device), overrides)
    texts = (
        list(read_queries(args.queries).values()) if args.queries else sample_queries(corpus, args.sample, args.seed)
    )
    vectors = _vectors(args, folder, corpus, encoder)
    found = tune(folder, corpus, encoder.encode_queries(texts), vectors, config)
    sys.stdout.write(table(found, config.k) + "\n")


def _vectors(args: argparse.Namespace, folder: Path, corpus: Corpus, encoder: Encoder) -> np.ndarray | None:
    """Return what the encoder made of the corpus, if it was kept."""
    path = args.embedding_path or vectors_folder(folder)
    if args.embedding_path:
        vectors = open_embeddings(path, len(corpus), encoder.width)
    elif path.is_dir():
        vectors = open_vectors(path, corpus)
    else:
        return None
    if vectors.shape[1] != encoder.width:
        raise DataError(f"{path} holds vectors of {vectors.shape[1]} numbers, expected {encoder.width}; remove them")
    check_vectors(lambda row, _: vectors[row], "Flat", encoder, corpus, path)
    return vectors


def _parser() -> argparse.ArgumentParser:
    config = TuneConfig()
    parser = argparse.ArgumentParser(
        prog="python -m verl.retrieval.build tune",
        description="Measure recall and speed of an index for rising nprobe or efSearch, and record the smallest value "
        "that reaches the target beside the index.",
    )
    parser.add_argument("--index_path", required=True, help="folder of the index")
    add_corpus_flags(parser)
    parser.add_argument("--target_recall", type=float, default=config.target_recall, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=config.k, help="documents that count (default: %(default)s)")
    parser.add_argument("--queries", type=Path, help="jsonl (_id, text) or tsv; titles of the corpus if not given")
    parser.add_argument("--sample", type=int, default=config.sample, help="titles to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=config.seed, help="of that draw (default: %(default)s)")
    parser.add_argument(
        "--embedding_path",
        type=Path,
        help="raw float32 vectors of the corpus, for exact search (default: those of --save_embedding, else the codes)",
    )
    add_encoder_choice(parser)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    return parser
