"""Measure the reranker against sentence-transformers' `predict` called query by query, as ratios within one run.

    python scripts/bench/rerank.py --queries 8 --documents 50

Every row scores the same pairs, and the scores must agree. Without `--model` the network has the shape of
ms-marco-MiniLM-L12 and random weights: the time is the same, the scores mean nothing. Pin the process (`taskset`) for
figures that compare.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from verl.retrieval.rerank import CrossEncoderReranker
from verl.types import Document

Scores = list[float]

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_TOLERANCE = 1e-3
_RUNS = 3


def write_model(folder: Path, layers: int) -> str:
    """Save a cross-encoder of MiniLM's width with random weights and a tokenizer of syllables."""
    folder.mkdir()
    pieces = [*_SYLLABLES, *(f"##{syllable}" for syllable in _SYLLABLES)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]), "utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(pieces),
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def write_pairs(queries: int, documents: int, rng: random.Random) -> tuple[list[str], list[list[Document]]]:
    """Return queries of 6 words, each with passages of 40 to 100 words."""

    def words(count: int) -> str:
        return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 2))) for _ in range(count))

    lists = [
        [Document(f"{query}-{at}", words(2), words(rng.randint(40, 100))) for at in range(documents)]
        for query in range(queries)
    ]
    return [words(6) for _ in range(queries)], lists


def measure(queries: Sequence[str], lists: Sequence[Sequence[Document]], model: str, device: str | None) -> str:
    """Time each way, after a first call that is not counted, and lay out the rates."""
    network, reranker = CrossEncoder(model, device=device), CrossEncoderReranker(model, device)
    asked = [[(query, each) for each in own] for query, own in zip(queries, lists, strict=True)]
    texts = [[(query, f"{each.title}\n{each.text}") for query, each in own] for own in asked]

    def predict() -> Scores:
        return [score for own in texts for score in network.predict(own, batch_size=32, show_progress_bar=False)]

    def one_by_one() -> Scores:
        return [score for own in asked for score in reranker.score(own)]

    def together() -> Scores:
        return reranker.score([pair for own in asked for pair in own])

    network.predict(texts[0][:1], show_progress_bar=False)
    reranker.score(asked[0][:1])
    first, expected = _timed(predict)
    lines = [f"{'':<28}{'pairs/s':>10}{'x predict':>11}"]
    lines.append(f"  {'predict, query by query':<26}{len(expected) / first:>10.1f}{1:>11.2f}")
    for name, way in (("ours, query by query", one_by_one), ("ours, queries together", together)):
        seconds, scores = _timed(way)
        lines.append(f"  {name:<26}{len(scores) / seconds:>10.1f}{first / seconds:>11.2f}")
        worst = max(abs(ours - theirs) for ours, theirs in zip(scores, expected, strict=True))
        if not worst <= _TOLERANCE:
            raise SystemExit(f"{name}: a score differs by {worst:g}; expected at most {_TOLERANCE:g}")
    return "\n".join(lines)


def _timed(way: Callable[[], Scores]) -> tuple[float, Scores]:
    """Return the least seconds of three runs and the scores."""
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        scores = way()
        best = min(best, time.perf_counter() - start)
    return best, scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the reranker.")
    parser.add_argument("--model", help="cross-encoder to use: local folder or Hugging Face name")
    parser.add_argument("--layers", type=int, default=12, help="of the network with random weights")
    parser.add_argument("--device")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    queries, lists = write_pairs(args.queries, args.documents, random.Random(args.seed))
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_model(Path(folder) / "model", args.layers)
        sys.stdout.write(measure(queries, lists, model, args.device) + "\n")


if __name__ == "__main__":
    main()
