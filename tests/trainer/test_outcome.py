"""The report of a training run."""

from __future__ import annotations

from dataclasses import replace

from tests.trainer.fakes import question
from verl.trainer.outcome import naive_rag, searcher
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
