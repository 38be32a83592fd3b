"""`python -m verl.retrieval.build plan`: what each kind of dense index would need here, and which one to take."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import faiss
import torch

from verl.errors import ConfigError
from verl.retrieval.build_flags import add_corpus_flags, add_encoder_choice
from verl.retrieval.calibrate import Rates, calibrate
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig, read_overrides
from verl.retrieval.index_kinds import IndexConfig
from verl.retrieval.plan import choose, estimate_all, format_time, parse_size, table

_SAMPLE = 64


def run(arguments: Sequence[str]) -> None:
    """Write the plan to standard output.

    Raises:
        ConfigError: neither a corpus nor a number of documents, or the vectors' width cannot be found out.
        DataError: the corpus cannot be read.
    """
    args = _parser().parse_args(arguments)
    if (args.corpus_path is None) == (args.documents is None):
        raise ConfigError("plan needs either --corpus_path or --documents")
    ram, gpu = parse_size(args.ram), parse_size(args.gpu) if args.gpu else 0.0
    if args.threads:
        torch.set_num_threads(args.threads)
        faiss.omp_set_num_threads(args.threads)
    corpus = Corpus.open(args.corpus_path, args.corpus_cache, args.on_error) if args.corpus_path else None
    rows = args.documents if corpus is None else len(corpus)
    if rows < 1:
        raise ConfigError(f"documents={rows}; expected at least 1")
    width, documents_per_s = (args.width, args.documents_per_s) if args.width else _encoder(args, corpus)
    config = IndexConfig()
    rates = Rates() if args.no_calibration else calibrate(width, config)
    estimates = estimate_all(config, rows, width, rates)
    threads = faiss.omp_get_max_threads()
    choice = choose(estimates, ram, gpu, threads)
    lines = [
        f"{rows:,} documents, vectors of {width} numbers, {threads} threads",
        table(estimates),
        "",
        f"take {choice.kind} on the {choice.device}: {choice.reason}",
        _encoding(rows, width, documents_per_s),
        "times and speeds are estimates "
        + ("from a short measurement on this machine" if rates.measured else "from constants, not of this machine")
        + f"; the disk is taken to move {rates.disk_bytes / 1e9:.1f} GB/s",
        "queries/s: one CPU core, before tuning, an order of magnitude",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _encoding(rows: int, width: int, documents_per_s: float | None) -> str:
    space = f"its vectors take {4 * rows * width / 1e9:.1f} GB of disk until the index is built"
    if documents_per_s is None:
        return f"encoding the corpus comes on top, at a speed that was not measured; {space}"
    seconds = format_time(rows / documents_per_s)
    return f"encoding the corpus comes on top: about {seconds} at {documents_per_s:.0f} documents/s; {space}"


def _encoder(args: argparse.Namespace, corpus: Corpus | None) -> tuple[int, float | None]:
    """Load the encoder for the width of its vectors; with a corpus, also measure its speed."""
    from verl.retrieval.encoder import load_encoder

    try:
        config, overrides = EncoderConfig(args.device), read_overrides(args.encoder_spec)
        encoder = load_encoder(args.retriever_name, args.retriever_model, config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{error}; or pass --width, the numbers of a vector (768 for e5-base-v2)") from error
    if corpus is None or args.documents_per_s is not None:
        return encoder.width, args.documents_per_s
    step = max(1, len(corpus) // _SAMPLE)
    passages = [corpus[row].contents for row in range(0, len(corpus), step)][:_SAMPLE]
    encoder.encode_passages(passages[:8])
    start = time.perf_counter()
    encoder.encode_passages(passages)
    return encoder.width, len(passages) / (time.perf_counter() - start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m verl.retrieval.build plan",
        description="Say what each kind of dense index would need for a corpus, and pick one.",
    )
    add_corpus_flags(parser, required=False)
    parser.add_argument("--documents", type=int, help="number of documents, in place of a corpus")
    parser.add_argument("--ram", required=True, help="memory of the machine that serves, for example 64GB")
    parser.add_argument("--gpu", help="memory of its GPUs, for example 24GB or 4x24GB (default: none)")
    parser.add_argument("--retriever_name", default="e5", help="encoder (default: %(default)s)")
    add_encoder_choice(parser)
    parser.add_argument("--width", type=int, help="numbers of a vector; the encoder is then not loaded")
    parser.add_argument("--documents_per_s", type=float, help="speed of encoding, in place of a measurement")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all that the process may use)")
    parser.add_argument("--no_calibration", action="store_true", help="use constants in place of a measurement")
    return parser
