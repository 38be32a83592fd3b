"""The figures of the controls, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.errors import DataError
from verl.evaluation.control_contexts import MEANINGS, Condition, ConditionName
from verl.evaluation.repeats import Rate, Repeatability
from verl.evaluation.report import markdown
from verl.evaluation.summary import ScoreReport, ScoringConfig, Summary
from verl.typed import Decoder

_DECODER = Decoder(error=DataError)

DIFFERENCES: tuple[tuple[str, ConditionName, ConditionName], ...] = (
    ("gain over the baseline", "method", "baseline"),
    ("gain with as many documents as the baseline", "method_cut", "baseline"),
    ("gain over the baseline with as many documents as the method", "method", "baseline_cut"),
    ("gain over random documents", "method", "random"),
    ("gain over no documents", "method", "none"),
    ("what the gold passages would add", "gold", "method"),
)
"""Differences of accuracy that the report states: name, and which condition minus which."""


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """One condition on one source."""

    n: int
    documents: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True, slots=True)
class ConditionFigures:
    """One condition; failed questions count as not accurate.

    Attributes:
        n: questions asked; `failed` of them could not be answered.
        documents: mean number given; `short` questions got fewer than the condition wants.
        documents_read: mean number that fitted into the prompt, over the questions that were answered.
        recall: of the gold passages, None where no question names any.
    """

    name: ConditionName
    n: int
    failed: int
    documents: float
    documents_read: float
    short: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    em: float
    recall: float | None
    answer_in_context: float
    by_source: Mapping[str, SourceFigures]


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy in condition `left` minus that in `right`, on the questions of both, with a paired interval."""

    name: str
    left: ConditionName
    right: ConditionName
    value: Rate
    by_source: Mapping[str, Rate]


@dataclass(frozen=True, slots=True)
class ControlsReport:
    """All that the controls found.

    Attributes:
        left_out: conditions that say nothing about any question, for example where no gold passage is known.
        repeatability: None where it was not measured.
    """

    method: str
    seed: int
    conditions: tuple[ConditionFigures, ...]
    left_out: tuple[ConditionName, ...]
    differences: tuple[Difference, ...]
    repeatability: Repeatability | None


def build_report(
    method: str,
    seed: int,
    conditions: Sequence[Condition],
    scored: Mapping[str, ScoreReport],
    repeatability: Repeatability | None,
    config: ScoringConfig,
) -> ControlsReport:
    """Put the report together; `scored` has the conditions that could be scored, by name."""
    pairs = [pair for pair in DIFFERENCES if pair[1] in scored and pair[2] in scored]
    return ControlsReport(
        method=method,
        seed=seed,
        conditions=tuple(condition_figures(item, scored[item.name]) for item in conditions if item.name in scored),
        left_out=tuple(item.name for item in conditions if item.name not in scored),
        differences=tuple(difference(*pair, scored, config) for pair in pairs),
        repeatability=repeatability,
    )


def condition_figures(condition: Condition, scored: ScoreReport) -> ConditionFigures:
    """Return the figures of a condition that has been scored."""
    overall = scored.overall
    read = [row.documents_used for row in scored.rows if not row.failed]
    return ConditionFigures(
        name=condition.name,
        n=overall.n,
        failed=overall.failed,
        documents=overall.documents,
        documents_read=sum(read) / max(len(read), 1),
        short=condition.short,
        accuracy=overall.accuracy,
        accuracy_low=overall.accuracy_low,
        accuracy_high=overall.accuracy_high,
        em=overall.em,
        recall=overall.recall,
        answer_in_context=overall.answer_in_context,
        by_source={source: _source(summary) for source, summary in scored.by_source.items()},
    )


def difference(
    name: str,
    left: ConditionName,
    right: ConditionName,
    scored: Mapping[str, ScoreReport],
    config: ScoringConfig,
) -> Difference:
    """Return the difference of two scored conditions that have questions in common."""
    before = {row.id: row.accurate for row in scored[right].rows}
    changes: dict[str, list[float]] = {}
    for row in scored[left].rows:
        if row.id in before:
            changes.setdefault(row.source, []).append(float(row.accurate) - float(before[row.id]))
    everything = [change for source in sorted(changes) for change in changes[source]]
    by_source = {source: Rate.of(values, config) for source, values in sorted(changes.items())}
    return Difference(name, left, right, Rate.of(everything, config), by_source)


def conditions_table(report: ControlsReport) -> list[list[str]]:
    """Return the conditions as rows of cells, the first one the headings."""
    head = ["condition", "accuracy", "95 %", "EM", "answer in context", "recall"]
    head += ["documents", "read", "short", "failed", "n"]
    return [head, *(_condition_row(figures) for figures in report.conditions)]


def difference_table(report: ControlsReport) -> list[list[str]]:
    """Return the differences as rows of cells, in percentage points."""
    head = ["difference", "conditions", "points", "95 %", "n"]
    return [
        head,
        *(
            [item.name, f"{item.left} - {item.right}", _points(item.value.value), _interval(item.value), _n(item.value)]
            for item in report.differences
        ),
    ]


def source_table(report: ControlsReport) -> list[list[str]]:
    """Return the accuracy of each condition on each source as rows of cells, with the interval and the questions."""
    sources = sorted({source for figures in report.conditions for source in figures.by_source})
    rows = [
        [figures.name, *(_source_cell(figures.by_source.get(source)) for source in sources)]
        for figures in report.conditions
    ]
    gains = [
        [f"{item.left} - {item.right}", *(_rate_cell(item.by_source.get(source)) for source in sources)]
        for item in report.differences
    ]
    return [["condition", *sources], *rows, *gains]


def repeat_table(repeatability: Repeatability) -> list[list[str]]:
    """Return the repeatability as rows of cells."""
    rates = {
        f"all {repeatability.repeats} verdicts alike": repeatability.same_verdict,
        f"all {repeatability.repeats} answers alike": repeatability.same_answer,
        "two verdicts alike": repeatability.pair_verdict,
        "two answers alike": repeatability.pair_answer,
    } | {f"two verdicts alike, {source}": rate for source, rate in repeatability.by_source.items()}
    rows = [[name, f"{100 * rate.value:.1f}", _interval(rate, "–"), _n(rate)] for name, rate in rates.items()]
    return [["", "%", "95 %", "n"], *rows]


def markdown_report(report: ControlsReport) -> str:
    """Return the whole report as markdown."""
    parts = [f"# Controls of {report.method}"]
    if report.conditions:
        lines = [f"- **{figures.name}**: {MEANINGS[figures.name]}." for figures in report.conditions]
        parts += ["What the generator is given:\n\n" + "\n".join(lines) + "\n", markdown(conditions_table(report))]
        parts.append(
            "Accuracy with its 95 % bootstrap interval, EM, answer in context and recall of gold passages in %; "
            "documents are those given, on average, of which so many were read (fitted into the prompt), and short "
            "counts the questions that got fewer than the condition wants. A failed question counts as not accurate.\n"
        )
    if report.left_out:
        parts.append(f"Left out, because no question has what it takes: {', '.join(report.left_out)}.\n")
    if report.differences:
        parts += ["## Differences", markdown(difference_table(report))]
        parts.append("Accuracy in percentage points on the questions of both conditions, with a paired interval.\n")
    if report.conditions:
        parts += ["## By source", markdown(source_table(report))]
        parts.append("Accuracy in %, its interval and the number of questions; differences in points.\n")
    if report.repeatability is not None:
        parts += ["## Repeatability of the generator", _repeat_text(report.repeatability)]
        parts.append(markdown(repeat_table(report.repeatability)))
    parts.append(f"Seed {report.seed}.\n")
    return "\n".join(parts)


def _repeat_text(found: Repeatability) -> str:
    low, high = min(found.accuracies), max(found.accuracies)
    seeds = "no seed sent" if None in found.seeds else "seeds " + ", ".join(map(str, found.seeds))
    return (
        f"The method's contexts of {found.same_verdict.n} questions were asked {found.repeats} times each without a "
        f"cache, at temperature {found.temperature:g} ({seeds}); {found.failed} more failed. Accuracy of one repeat "
        f"was {100 * low:.1f} to {100 * high:.1f} %.\n"
    )


def _condition_row(figures: ConditionFigures) -> list[str]:
    recall = "" if figures.recall is None else f"{100 * figures.recall:.1f}"
    return [
        figures.name,
        f"{100 * figures.accuracy:.1f}",
        f"{100 * figures.accuracy_low:.1f}–{100 * figures.accuracy_high:.1f}",
        f"{100 * figures.em:.1f}",
        f"{100 * figures.answer_in_context:.1f}",
        recall,
        f"{figures.documents:.1f}",
        f"{figures.documents_read:.1f}",
        str(figures.short),
        str(figures.failed),
        str(figures.n),
    ]


def controls_summary(folder: Path) -> dict[str, Any]:
    """Return the tables of a finished run for a report over several methods, as rows of cells, and where to read more.

    Returns:
        {"differences": rows, "repeatability": rows or None, "details": path of `controls.md`}.

    Raises:
        DataError: `folder` holds no controls, or malformed ones.
    """
    path = folder / "controls.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no controls.json; expected the output folder of verl.evaluation.controls")
    try:
        report = _DECODER.decode(ControlsReport, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, DataError) as cause:
        raise DataError(f"{path}: {cause}; run verl.evaluation.controls again") from cause
    repeated = report.repeatability and repeat_table(report.repeatability)
    return {"differences": difference_table(report), "repeatability": repeated, "details": str(folder / "controls.md")}


def _source(summary: Summary) -> SourceFigures:
    return SourceFigures(summary.n, summary.documents, summary.accuracy, summary.accuracy_low, summary.accuracy_high)


def _source_cell(figures: SourceFigures | None) -> str:
    if figures is None:
        return ""
    low, high = 100 * figures.accuracy_low, 100 * figures.accuracy_high
    return f"{100 * figures.accuracy:.1f} ({low:.1f}–{high:.1f}; {figures.n})"


def _rate_cell(rate: Rate | None) -> str:
    return "" if rate is None else f"{_points(rate.value)} ({_interval(rate)}; {rate.n})"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(rate: Rate, to: str = " to ") -> str:
    sign = "" if to == "–" else "+"
    return f"{100 * rate.low:{sign}.1f}{to}{100 * rate.high:{sign}.1f}"


def _n(rate: Rate) -> str:
    return str(rate.n)
