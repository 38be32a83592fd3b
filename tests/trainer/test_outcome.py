"""The report of a training run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.trainer.fakes import question
from verl.trainer.loop import Summary
from verl.trainer.outcome import _write_parts, naive_rag, searcher
from verl.types import Baseline, Document

HALF = Document("a", "A", "text")


def rated(number: int, correct: bool, kind: str):
    baseline = Baseline((HALF,), "answer", correct)
    return replace(question(str(number)), baseline=baseline, gold_titles=("A", "B"), kind=kind)


def test_naive_rag_figures_come_from_the_baseline_column() -> None:
    questions = [rated(0, True, "1-hop"), rated(1, False, "2-hop"), rated(2, False, "2-hop"), rated(3, True, "2-hop")]
    figures = naive_rag(questions)["naive_rag"]
    assert figures["accuracy"] == 0.5
    assert figures["recall"] == 0.5  # one of two gold titles each
    assert figures["accuracy_by_kind"] == {"1-hop": 1.0, "2-hop": 1 / 3}
    assert (figures["n"], figures["searches"], figures["documents"]) == (4, 1.0, 1.0)


def test_without_baselines_there_is_no_naive_rag() -> None:
    assert naive_rag([question()]) == {}


def test_a_searcher_figures_come_from_its_validation_row() -> None:
    row = {
        **{"step": 20, "val/accuracy": 0.75, "val/accuracy/2-hop": 0.5, "val/gold_recall": 0.9, "val/searches": 1.25},
        **{"val/n": 8.0, "val/failed": 1.0, "val/seconds": 3.5, "reward/mean": 9.0, "val/documents": 4.5},
    }
    assert searcher(row) == {
        **{"accuracy": 0.75, "recall": 0.9, "searches": 1.25, "n": 8, "seconds": 3.5, "failed": 1},
        **{"accuracy_by_kind": {"2-hop": 0.5}, "documents": 4.5},
    }


def test_a_run_without_answers_reports_the_parts_of_its_reward(tmp_path: Path) -> None:
    rows = [
        {"step": step, "val/score": score, "val/recall": recall}
        for step, score, recall in ((0, 0.7, 0.38), (9, 5.9, 1))
    ]
    _write_parts(tmp_path, rows, 3, Summary("grpo", 9, 144, 1152, 60.0))
    assert "| val/recall | 0.38 | 1 |" in (tmp_path / "report.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["validation"], report["training"]["steps"]) == (rows, 9)
