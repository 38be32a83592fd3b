"""Retrieval quality on real test collections beside independently computed values, in one command.

    python -m verl.evaluation.retrieval_quality folder=../shared/data output=outputs/retrieval_quality

SciFact, and the pool of Wikipedia passages that question sets ship, become BEIR folders; BM25 and MiniLM (flat) are
indexed and measured by `python -m verl.retrieval.evaluate`; `verl.evaluation.retrieval_reference`, which has no code in
common with the retriever, says what they should earn. A difference above the tolerance is an error. Folders and indexes
are kept and taken up by the next run; what is measured is measured anew.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from data_preprocess import scifact
from data_preprocess.pooled_corpus import PoolConfig, pool_corpus
from data_preprocess.readers.source import SourceConfig
from verl.config import run_entry
from verl.errors import DataError
from verl.evaluation import retrieval_reference as reference
from verl.evaluation.journal import write_whole
from verl.retrieval import evaluate
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus

logger = logging.getLogger(__name__)

RetrieverName = Literal["bm25", "minilm"]
_REFERENCES: Mapping[RetrieverName, Callable[..., reference.Run]] = {"bm25": reference.bm25, "minilm": reference.dense}
PUBLISHED: Mapping[tuple[str, RetrieverName, str], float] = {
    # Anserini's regression "BEIR (v1.0.0): SciFact", BM25 over a flat Lucene index.
    ("scifact/test", "bm25", "ndcg@10"): 0.6789,
    ("scifact/test", "bm25", "recall@100"): 0.9253,
    # As known for all-MiniLM-L6-v2, to three digits; passages as BEIR has them, with a blank after the title.
    ("scifact/test", "minilm", "ndcg@10"): 0.645,
}


@dataclass(frozen=True)
class QualityConfig:
    """What is measured.

    Attributes:
        output: folder of everything that is built, of runs and metrics, and of the table (`summary.md`, `report.json`).
        folder: that of the published files; `configs/retrieval_quality.yaml` says which they are.
        scifact: the zip of SciFact, None to leave it out.
        questions, passages: sources of the pool, as in `verl.evaluation.multihop`.
        splits: of the pool's judgements; none leave the pool out.
        pool_size: search only so many passages of the pool, those that a split judges and others spread evenly over
            it; None takes all. Encoding a passage takes a CPU core 50 to 100 ms on each side.
        retrievers: by which the collections are searched.
        tolerance: the largest difference from a value that is not an error.
    """

    output: Path
    folder: Path
    scifact: Path | None = None
    questions: Mapping[str, SourceConfig] = field(default_factory=dict)
    passages: Mapping[str, SourceConfig] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    pool_size: int | None = None
    retrievers: tuple[RetrieverName, ...] = get_args(RetrieverName)
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not self.retrievers or self.tolerance <= 0:
            raise ValueError(f"retrievers={self.retrievers}, tolerance={self.tolerance}; expected some, and above 0")
        if self.scifact is None and not self.splits:
            raise ValueError("scifact=null and splits=[] leave nothing to measure; name one of them")
        if self.splits and not {**self.questions, **self.passages}:
            raise ValueError(f"splits={self.splits} came without sources; name some, or pass splits=[]")


@dataclass(frozen=True, slots=True)
class Compared:
    """One number beside what it should be.

    Attributes:
        collection: folder and split.
        published: None where no value is known.
    """

    collection: str
    passages: int
    queries: int
    retriever: RetrieverName
    measure: str
    ours: float
    reference: float
    published: float | None

    @property
    def difference(self) -> float:
        """How far ours is from the reference."""
        return self.ours - self.reference

    @property
    def worst(self) -> float:
        """The larger of the distances from the reference and the published value."""
        others = [value for value in (self.reference, self.published) if value is not None]
        return max(abs(self.ours - value) for value in others)


def measure(config: QualityConfig) -> list[Compared]:
    """Build and measure as configured, and write the table.

    Raises:
        ConfigError, DataError: the data is not there or cannot be used.
    """
    rows: list[Compared] = []
    if config.scifact is not None:
        folder = config.output / "scifact"
        if not (folder / "corpus.jsonl").is_file():
            scifact.convert(config.scifact, folder)
        rows += compare(folder, ("test",), config.retrievers, config.output)
    if config.splits:
        folder = config.output / "pool"
        pool_corpus(PoolConfig(folder / "corpus.jsonl", {**config.questions, **config.passages}))
        if config.pool_size is not None:
            folder = sample(folder, config.splits, config.pool_size, config.output / f"pool-{config.pool_size}")
        rows += compare(folder, config.splits, config.retrievers, config.output)
    lines = [{**asdict(row), "difference": row.difference} for row in rows]
    write_whole(config.output / "report.json", json.dumps(lines, indent=1) + "\n")
    write_whole(config.output / "summary.md", table(rows))
    return rows


def sample(folder: Path, splits: Sequence[str], size: int, target: Path) -> Path:
    """Write a BEIR folder with `size` passages of another: those that a split judges, others spread evenly over it.

    Returns:
        `target`.

    Raises:
        DataError: more passages are judged, or there are fewer in all.
    """
    qrels = {split: (folder / "qrels" / f"{split}.tsv").read_text("utf-8") for split in splits}
    judged = {line.split("\t")[1] for text in qrels.values() for line in text.splitlines()[1:]}
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        lines = list(file)
    needed = [json.loads(line)["id"] in judged for line in lines]
    free, more = needed.count(False), size - sum(needed)
    if not 0 <= more <= free:
        raise DataError(f"pool_size={size}; expected {sum(needed)}, the judged passages, to {len(lines)}, all of them")
    others = [at for at, wanted in enumerate(needed) if not wanted]
    chosen = {others[at * free // more] for at in range(more)}
    kept = [line for at, line in enumerate(lines) if needed[at] or at in chosen]
    for split, text in qrels.items():
        write_whole(target / "qrels" / f"{split}.tsv", text)
    write_whole(target / "queries.jsonl", (folder / "queries.jsonl").read_text("utf-8"))
    write_whole(target / "corpus.jsonl", "".join(kept))
    return target


def compare(folder: Path, splits: Sequence[str], retrievers: Sequence[RetrieverName], output: Path) -> list[Compared]:
    """Measure retrievers on the splits of a BEIR folder, and compute what they should earn.

    Args:
        output: receives the indexes, and a folder with run and metrics for each split and retriever.
    """
    judged, corpus = reference.read(folder, splits), Corpus.open(folder)
    rows: list[Compared] = []
    for name in retrievers:
        index = output / "indexes" / f"{folder.name}-{name}"
        build_index(corpus, name, index)
        ours = {split: _ours(folder, split, name, index, output / "runs") for split in splits}
        logger.info("computing the reference of %s on %s, %d passages", name, folder.name, len(judged.passages))
        run = _REFERENCES[name](judged.passages, judged.queries)
        for split in splits:
            expected = reference.score(run, judged.qrels[split])
            rows += [
                Compared(
                    f"{folder.name}/{split}",
                    len(judged.passages),
                    len(judged.qrels[split]),
                    name,
                    measure,
                    ours[split][measure],
                    expected[measure],
                    PUBLISHED.get((f"{folder.name}/{split}", name, measure)),
                )
                for measure in reference.MEASURES
            ]
    return rows


def _ours(folder: Path, split: str, name: str, index: Path, output: Path) -> dict[str, float]:
    """Measure through the command line; returns the means."""
    target = output / f"{folder.name}-{split}-{name}"
    where = ["--collection", folder, "--split", split, "--index_path", index, "--output", target]
    evaluate.main([*map(str, where), "--retriever_name", name])
    report = json.loads((target / evaluate.METRICS_NAME).read_text("utf-8"))
    return {measure: report["metrics"][measure]["mean"] for measure in reference.MEASURES}


def table(rows: Sequence[Compared]) -> str:
    """Lay out the comparison in markdown."""
    lines = [
        "| collection | passages | queries | retriever | measure | ours | reference | difference | published |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        published = "–" if row.published is None else f"{row.published:.4f}"
        values = f"{row.ours:.4f} | {row.reference:.4f} | {row.difference:+.4f} | {published}"
        sizes = f"{row.passages:,} | {row.queries:,}"
        lines.append(f"| {row.collection} | {sizes} | {row.retriever} | {row.measure} | {values} |")
    return "\n".join(lines) + "\n"


def check(rows: Sequence[Compared], tolerance: float) -> None:
    """Raise DataError, which names them, where numbers are further from what they should be than `tolerance`."""
    wrong = [f"{row.measure} of {row.retriever} on {row.collection} is {row.worst:.4f} off" for row in rows]
    wrong = [text for text, row in zip(wrong, rows, strict=True) if not row.worst <= tolerance]
    if wrong:
        raise DataError(f"{'; '.join(wrong)}; expected at most {tolerance}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("retrieval_quality", QualityConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: QualityConfig) -> None:
    rows = measure(config)
    sys.stdout.write("\n" + table(rows))
    check(rows, config.tolerance)


if __name__ == "__main__":
    sys.exit(main())
