"""Measure how fast texts become vectors, as ratios within one run, and how far the vectors of two ways differ.

    python scripts/bench/encoder.py --threads 1
    python scripts/bench/encoder.py --retriever_name e5 --retriever_model intfloat/e5-base-v2 --device cuda:0

Every way gets the same synthetic questions (one at a time, and in batches) and passages. The first one is the textbook
use of transformers: texts in the order they come, padded to the longest of their batch. ONNX Runtime takes part where
`onnxruntime` and `onnx` are installed. With one thread the CPU time of the process counts, so that other work on the
machine disturbs less; otherwise the time on the clock.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from verl.retrieval.encoder import Encoder, Tokens, batches, default_model, load_encoder
from verl.retrieval.encoder_network import Head, TransformersNetwork, load_model
from verl.retrieval.encoder_spec import ENCODERS, EncoderConfig, EncoderSpec

Ids = Sequence[Sequence[int]]
Way = Callable[[Ids], np.ndarray]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every way has to encode, as token ids."""

    questions: Ids
    passages: Ids
    batch: int
    singles: int
    repeats: int
    cpu_time: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One way, in texts per second, and its largest difference from the first way's vectors."""

    name: str
    single: float
    questions: float
    passages: float
    difference: float


def texts(encoder: Encoder, count: int, words: tuple[int, int], generator: random.Random) -> Ids:
    """Return token ids of `count` texts with so many words, which are whole words of the tokenizer's vocabulary."""
    tokenizer = encoder._passages.tokenizer
    known = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    drawn = [" ".join(generator.choices(known, k=generator.randint(*words))) for _ in range(count)]
    return encoder.tokenize_passages(drawn).ids


def textbook(model: PreTrainedModel, head: Head) -> Way:
    """Pad every batch to its longest text."""
    network = TransformersNetwork(model, head)
    network.equal_lengths = False
    return network


def grouped(network: TransformersNetwork, batch: int) -> Way:
    """Put texts of one length together, without padding."""

    def encode(tokens: Ids) -> np.ndarray:
        vectors = np.empty((len(tokens), network.width), np.float32)
        for rows in batches([len(text) for text in tokens], batch, 1 << 30, equal=True):
            vectors[rows] = network([tokens[row] for row in rows])
        return vectors

    return encode


def ours(name: str, model: str | None, config: EncoderConfig) -> Way:
    """What the retriever runs."""
    encoder = load_encoder(name, model, config)
    return lambda tokens: encoder.encode_tokens(Tokens(tuple(tokens), 0))


def onnx(source: str, spec: EncoderSpec, threads: int, batch: int) -> Way:
    """ONNX Runtime over texts of one length; raises ImportError where it is not installed."""
    import onnxruntime

    model = load_model(source, torch.float32)
    model.set_attn_implementation("eager")
    example = torch.ones(2, 8, dtype=torch.long)
    inputs = ["input_ids", "attention_mask"]
    axes = {name: {0: "texts", 1: "tokens"} for name in (*inputs, "hidden")}

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            Hidden(), (example, example), path, input_names=inputs, output_names=["hidden"], dynamic_axes=axes,
            opset_version=17, dynamo=False,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    head = Head.of(spec)

    class Network:
        width = model.config.hidden_size

        def __call__(self, tokens: Ids) -> np.ndarray:
            ids = np.array(tokens)
            (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            return head.finish(head.pool(torch.from_numpy(hidden)))

    return grouped(Network(), batch)


def measure(name: str, encode: Way, work: Workload, expected: np.ndarray | None) -> Row:
    """Time one way; every rate is the best of a few repeats."""
    vectors = encode(work.questions[: work.batch])
    difference = 0.0 if expected is None else float(np.abs(vectors - expected).max())
    clock = time.process_time if work.cpu_time else time.perf_counter

    def rate(tokens: Ids, batch: int) -> float:
        best = float("inf")
        for _ in range(work.repeats):
            start = clock()
            for first in range(0, len(tokens), batch):
                encode(tokens[first : first + batch])
            best = min(best, clock() - start)
        return len(tokens) / best

    single = rate(work.questions[: work.singles], 1)
    return Row(name, single, rate(work.questions, work.batch), rate(work.passages, work.batch), difference)


def report(rows: Sequence[Row]) -> str:
    """Lay out rates and their ratios to the first row."""
    first = rows[0]
    lines = [f"{'':<44}{'1 question':>18}{'questions':>18}{'passages':>18}{'difference':>12}"]
    for row in rows:
        cells = "".join(
            f"{value:>10.1f}/s{value / base:>5.2f}x"
            for value, base in (
                (row.single, first.single),
                (row.questions, first.questions),
                (row.passages, first.passages),
            )
        )
        lines.append(f"{row.name:<44}{cells}{row.difference:>12.1e}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> list[Row]:
    """Measure every way that can run here."""
    torch.set_num_threads(args.threads)
    config = EncoderConfig(args.device)
    base = load_encoder(args.retriever_name, args.retriever_model, config)
    source = args.retriever_model or default_model(ENCODERS[args.retriever_name])
    device = "cpu" if args.device is None else args.device
    generator = random.Random(args.seed)
    work = Workload(
        texts(base, args.questions, (6, 14), generator),
        texts(base, args.passages, (80, 120), generator),
        args.batch,
        args.singles,
        args.repeats,
        cpu_time=args.threads == 1 and device == "cpu",
    )
    head = Head.of(base.spec)
    model = load_model(source, getattr(torch, base.precision)).to(device)
    rows = [measure(f"transformers, padded, {args.batch} texts", textbook(model, head), work, None)]
    expected = textbook(model, head)(work.questions[: work.batch])

    def add(name: str, encode: Way) -> None:
        rows.append(measure(name, encode, work, expected))

    if device == "cpu":
        add("transformers, grouped by length", grouped(TransformersNetwork(model, head), args.batch))
        rounded = TransformersNetwork(load_model(source, torch.bfloat16), head)
        add("the same in bfloat16 (not used: rounds)", grouped(rounded, args.batch))
        try:
            add("ONNX Runtime, grouped by length", onnx(source, base.spec, args.threads, args.batch))
        except ImportError as error:
            sys.stdout.write(f"without ONNX Runtime: {error}\n")
    for tokens in args.batch_tokens:
        add(
            f"ours, {tokens} tokens",
            ours(args.retriever_name, args.retriever_model, replace(config, batch_tokens=tokens)),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark encoders.")
    parser.add_argument("--retriever_name", default="minilm")
    parser.add_argument("--retriever_model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--passages", type=int, default=128)
    parser.add_argument("--singles", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    sys.stdout.write(report(run(args)) + "\n")


if __name__ == "__main__":
    main()
