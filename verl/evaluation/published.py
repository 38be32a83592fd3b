"""Results in the layout that published scripts read: `{source: {question: {answer, score, em_score}}}` and its sums."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.evaluation.journal import write_whole
from verl.evaluation.summary import ScoredQuestion
from verl.types import Question


def write_results(folder: Path, name: str, questions: Sequence[Question], rows: Sequence[ScoredQuestion]) -> None:
    """Write `{name}.json` and `{name}_stats.json`.

    The layout is keyed by the question's text: of questions that are worded alike it keeps the last. The sums are over
    all questions; one that could not be answered counts as wrong and has no answer.
    """
    texts = {question.id: question.text for question in questions}
    results: dict[str, dict[str, Any]] = {}
    totals: dict[str, Counter[str]] = {}
    for row in rows:
        entry = {"answer": row.answer, "score": int(row.accurate), "em_score": int(row.em)}
        results.setdefault(row.source, {})[texts[row.id]] = entry
        totals.setdefault(row.source, Counter()).update(total=1, correct=row.accurate, em_correct=row.em)
    stats = {source: _stats(total) for source, total in totals.items()}
    write_whole(folder / f"{name}.json", json.dumps(results, ensure_ascii=False, indent=1))
    write_whole(folder / f"{name}_stats.json", json.dumps(stats, indent=1))


def _stats(counts: Mapping[str, int]) -> dict[str, float]:
    total = counts["total"]
    return {
        "total": total,
        "correct": counts["correct"],
        "accuracy": counts["correct"] / total,
        "em_correct": counts["em_correct"],
        "em_accuracy": counts["em_correct"] / total,
    }
