"""What a finished training run reports: its validation figures beside naive RAG, and the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl.evaluation.journal import write_whole
from verl.evaluation.report import markdown, plot_curves, write_report
from verl.rewards.recall import gold_recall
from verl.trainer.config import TrainConfig
from verl.trainer.data import validation_questions
from verl.trainer.loop import Summary
from verl.trainer.tracking import HISTORY, read_all
from verl.types import Question

Row = Mapping[str, float]


def write_outcome(config: TrainConfig, summary: Summary) -> dict[str, Any]:
    """Write `report.png`, `report.md` and `report.json` into the run's folder; return the report.

    The methods are those that training has figures of: naive RAG from the baseline column, the base searcher from the
    validation before training (if there was one), the trained searcher from the last one. Of a run whose reward asks
    for no answers, the report is the parts of the reward, validated first and last.
    """
    folder = config.trainer.folder
    history = read_all(folder / HISTORY)
    plot_curves(history, folder / "report.png")
    if any("val/score" in row for row in history) and not any("val/accuracy" in row for row in history):
        return _write_parts(folder, [row for row in history if "val/score" in row], config.trainer.seed, summary)
    methods = naive_rag(validation_questions(config.data))
    validated = [row for row in history if "val/accuracy" in row]
    if validated and validated[0]["step"] == 0:
        methods["base_searcher"] = searcher(validated[0])
    if validated:
        methods["trained_searcher"] = searcher(validated[-1])
    return write_report(folder, methods, config.trainer.seed, {"training": asdict(summary)})


def _write_parts(folder: Path, validated: Sequence[Row], seed: int, summary: Summary) -> dict[str, Any]:
    """Write the report of a run without answers: validation metrics at its first and its last validation."""
    first, last = validated[0], validated[-1]
    names = [name for name in last if name.startswith("val/") and "/length" not in name]
    rows = [["metric", f"step {first['step']:g}", f"step {last['step']:g}"]]
    rows += [[name, f"{first[name]:.4g}" if name in first else "", f"{last[name]:.4g}"] for name in names]
    report = {"validation": [first, last], "seed": seed, "training": asdict(summary)}
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(folder / "report.md", f"# Report\n\n{markdown(rows)}\nSeed {seed}.\n")
    return report


def searcher(row: Row) -> dict[str, Any]:
    """Return a searcher's figures from a metrics row with a validation."""
    prefix = "val/accuracy/"
    return {
        "accuracy": row["val/accuracy"],
        "recall": row.get("val/gold_recall"),
        "documents": row.get("val/documents"),
        "searches": row["val/searches"],
        "n": int(row["val/n"]),
        "seconds": row["val/seconds"],
        "failed": int(row["val/failed"]),
        "accuracy_by_kind": {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)},
    }


def naive_rag(questions: Sequence[Question]) -> dict[str, Any]:
    """Return naive RAG's figures from the baseline column; empty where there is none."""
    rated = [(question, question.baseline) for question in questions if question.baseline is not None]
    if not rated:
        return {}
    recalls = [recall for q, b in rated if (recall := gold_recall(q, b.documents)) is not None]
    kinds: dict[str, list[bool]] = {}
    for question, baseline in rated:
        kinds.setdefault(question.kind, []).append(baseline.correct)
    figures = {
        "accuracy": sum(baseline.correct for _, baseline in rated) / len(rated),
        "recall": sum(recalls) / len(recalls) if recalls else None,
        "documents": sum(len(baseline.documents) for _, baseline in rated) / len(rated),
        "searches": 1.0,
        "n": len(rated),
        "seconds": 0.0,
        "accuracy_by_kind": {kind: sum(right) / len(right) for kind, right in kinds.items() if kind},
    }
    return {"naive_rag": figures}
