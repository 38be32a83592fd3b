"""Reports of a run: `report.json` for programs, `report.md` and a console table for people, curves as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.errors import DataError
from verl.evaluation.journal import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Any]
History = Sequence[Mapping[str, float]]

REQUIRED = ("accuracy", "recall", "searches", "n", "seconds")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: its heading, and the cell that it makes of a method's figures ("" for none)."""

    heading: str
    cell: Callable[[Figures], str]


def write_report(
    folder: Path, methods: Mapping[str, Figures], seed: int, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `report.json` and `report.md` into `folder`.

    Args:
        methods: by name, in the order of the table. Each has accuracy and recall in [0, 1] (recall None where no
            question names gold passages), searches per question, `n` questions, and `seconds`; further keys are kept.
            `accuracy_interval` [low, high], `accuracy_by_kind` {kind: accuracy}, `against_baseline` (a
            `verl.evaluation.summary.Comparison`), `own_em` and `documents`, the mean number given to the generator, get
            columns of their own, as have `scores` {name: share}, with the interval of the `headline` among
            them, and the `paper`'s figure; `intervals` {figure: [low, high]} bring a table of passages and costs.
        extra: further top-level keys. `stages` {name: seconds} and `controls` {method: summary} get tables of their
            own, `baseline` and `partial` {asked, missing} are named.

    Returns:
        What `report.json` holds: `{"methods": ..., "seed": ..., **extra}`, floats that are not finite as null.

    Raises:
        DataError: a method lacks a figure, or `extra` has a key of the report's own.
    """
    extra = dict(extra or {})
    _check(methods, extra)
    report = {"methods": _finite(methods), "seed": seed, **_finite(extra)}
    write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "report.md", _markdown(report))
    return report


def table(methods: Mapping[str, Figures]) -> list[list[str]]:
    """Return the table as rows of cells, the first one the headings."""
    columns = _columns(methods)
    rows = [["method", *(column.heading for column in columns)]]
    return rows + [[name, *(column.cell(figures) for column in columns)] for name, figures in methods.items()]


def passage_table(methods: Mapping[str, Figures]) -> list[list[str]]:
    """Return what the methods found, and at what cost, as rows of cells: over all questions, then by source."""
    head = ["method", "source", "recall", "95 %", "answer in context", "95 %", "documents", "searches", "tokens", "n"]
    rows = [head]
    for name, figures in methods.items():
        costs = [
            _number(figures.get("documents"), 1),
            _number(figures["searches"], 2),
            _number(figures.get("tokens"), 0),
        ]
        rows.append([name, "all", *_passage_cells(figures), *costs, str(figures["n"])])
        sources = figures.get("by_source", {})
        for source, found in sources.items() if len(sources) > 1 else ():
            rows.append([name, source, *_passage_cells(found), "", "", "", str(found["n"])])
    return rows


def _passage_cells(figures: Figures) -> list[str]:
    intervals = figures.get("intervals", {})
    return [
        cell
        for name in ("recall", "answer_in_context")
        for cell in (_share(figures.get(name)), _interval(intervals.get(name)))
    ]


def stage_table(stages: Mapping[str, float]) -> list[list[str]]:
    """Return the wall-clock of the stages, and their sum, as rows of cells."""
    rows = [[name, f"{seconds:.1f}"] for name, seconds in stages.items()]
    return [["stage", "seconds"], *rows, ["total", f"{sum(stages.values()):.1f}"]]


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Render rows of cells for a console, the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_plain_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Render rows of cells as a markdown table."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([head, rule, *body]) + "\n"


def plot_curves(history: History, path: Path) -> None:
    """Draw the training curves of one run; `plot_runs` with several overlaid."""
    plot_runs({"": history}, path)


def plot_runs(runs: Mapping[str, History], path: Path) -> None:
    """Draw the curves of training runs into one picture, whole or not at all.

    Args:
        runs: metrics rows by label, each row with `step`; a panel shows what of its metrics any row has, and panels
            without any are left out.

    Raises:
        DataError: no row of any run holds a metric that a panel shows.
    """
    from matplotlib.figure import Figure  # takes a second, and only reports of training runs draw

    panels = [panel for panel in _PANELS if any(_series(run, key) for run in runs.values() for key in panel.keys(run))]
    if not panels:
        shown = ", ".join(metric for panel in _PANELS for metric in panel.metrics)
        raise DataError(f"{path}: nothing to draw, no row has any of {shown}; log at least one step first")
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        _draw(axes, panel, runs)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=120)
    partial.replace(path)


@dataclass(frozen=True, slots=True)
class _Panel:
    """One plot. A metric that ends in `/*` stands for all metrics of that group."""

    title: str
    metrics: tuple[str, ...]

    def keys(self, history: History) -> list[str]:
        """Return the names of this panel's metrics in `history`, in a fixed order."""
        names = sorted({name for row in history for name in row})
        chosen = []
        for metric in self.metrics:
            group = metric.removesuffix("*")
            chosen += [name for name in names if name == metric or (group != metric and name.startswith(group))]
        return chosen


# Names as in verl/trainer/tracking.py.
_PANELS = (
    _Panel("reward", ("reward/mean",)),
    _Panel("accuracy (validation: greedy)", ("reward/accuracy", "val/accuracy")),
    _Panel("queries (validation: greedy)", ("reward/recall", "val/recall", "reward/ndcg", "val/ndcg")),
    _Panel("searches per question", ("env/searches", "val/searches")),
    _Panel("entropy of the policy", ("actor/entropy_loss",)),
    _Panel("KL to the reference", ("critic/kl", "actor/kl_loss")),
    _Panel("seconds per stage", ("timing_s/*",)),
)


def _draw(axes: Axes, panel: _Panel, runs: Mapping[str, History]) -> None:
    for label, history in runs.items():
        for key in panel.keys(history):
            points = _series(history, key)
            if points:
                steps, values = zip(*points, strict=True)
                name = key.partition("/")[2] if key.startswith("timing_s/") else key
                # One point has no line.
                axes.plot(steps, values, label=f"{label} {name}".strip(), marker="o" if len(points) < 20 else None)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _series(history: History, key: str) -> list[tuple[float, float]]:
    """Return the (step, value) pairs at which `key` was measured."""
    return [(row["step"], row[key]) for row in history if key in row and math.isfinite(row[key])]


def _columns(methods: Mapping[str, Figures]) -> list[Column]:
    columns = [Column("accuracy", lambda figures: _share(figures["accuracy"]))]
    if any("accuracy_interval" in figures for figures in methods.values()):
        columns.append(Column("95 %", lambda figures: _interval(figures.get("accuracy_interval"))))
    kinds = dict.fromkeys(kind for figures in methods.values() for kind in figures.get("accuracy_by_kind", {}))
    for kind in kinds:
        columns.append(Column(kind, lambda figures, kind=kind: _share(figures.get("accuracy_by_kind", {}).get(kind))))
    for name in dict.fromkeys(name for figures in methods.values() for name in figures.get("scores", {})):
        columns.append(Column(name, lambda figures, name=name: _share(figures.get("scores", {}).get(name))))
        if any(name == figures.get("headline") for figures in methods.values()):
            columns.append(
                Column("95 %", lambda figures, name=name: _interval(figures.get("score_intervals", {}).get(name)))
            )
    if any("paper" in figures for figures in methods.values()):
        columns.append(Column("paper", lambda figures: _share(figures.get("paper"))))
    if any("against_baseline" in figures for figures in methods.values()):
        columns.append(Column("difference", lambda figures: _difference(figures.get("against_baseline"))))
    if any(figures.get("own_em") is not None for figures in methods.values()):
        columns.append(Column("own EM", lambda figures: _share(figures.get("own_em"))))
    columns.append(Column("recall", lambda figures: _share(figures["recall"])))
    if any("documents" in figures for figures in methods.values()):
        columns.append(Column("documents", lambda figures: _number(figures.get("documents"), 1)))
    return [
        *columns,
        Column("searches", lambda figures: _number(figures["searches"], 2)),
        Column("n", lambda figures: str(figures["n"])),
        Column("seconds", lambda figures: _number(figures["seconds"], 1)),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.1f}–{100 * value[1]:.1f}"


def _difference(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    p = "p<0.001" if value["p"] < 0.001 else f"p={value['p']:.3f}"
    return f"{100 * value['difference']:+.1f} ({100 * value['low']:+.1f} to {100 * value['high']:+.1f}, {p})"


def _markdown(report: Mapping[str, Any]) -> str:
    parts = ["# Report", markdown(table(report["methods"]))]
    parts.append(
        "Accuracy, its 95 % bootstrap interval and recall of gold passages in %; searches per question are those that "
        "the method itself asked for, the round-0 retrieval is not counted; documents are those that the generator was "
        "given, on average.\n"
    )
    if "baseline" in report:
        parts.append(
            f"Differences are of accuracy against {report['baseline']} on the same questions, with a 95 % bootstrap "
            "interval and the p-value of McNemar's exact test.\n"
        )
    if any("intervals" in figures for figures in report["methods"].values()):
        parts += ["## Passages and costs", markdown(passage_table(report["methods"]))]
        parts.append("Recall of gold passages, and questions with a gold answer in their documents, in %.\n")
    if "partial" in report:
        gaps = ", ".join(f"{name} lacks {count}" for name, count in report["partial"]["missing"].items())
        parts.append(f"Partial: of {report['partial']['asked']} questions those that every method has; {gaps}.\n")
    for name, found in report.get("controls", {}).items():
        parts += [f"## Controls of {name}", markdown(found["differences"])]
        if found["repeatability"] is not None:
            parts.append(markdown(found["repeatability"]))
        parts.append(f"All conditions and sources: {found['details']}\n")
    if "stages" in report:
        parts += ["## Wall-clock", markdown(stage_table(report["stages"]))]
    parts.append(f"Seed {report['seed']}.\n")
    return "\n".join(parts)


def _plain_line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _check(methods: Mapping[str, Figures], extra: Mapping[str, Any]) -> None:
    for name, figures in methods.items():
        missing = [key for key in REQUIRED if key not in figures]
        if missing:
            raise DataError(f"method {name!r} lacks {', '.join(missing)}; a report needs {', '.join(REQUIRED)} of each")
    taken = [key for key in ("methods", "seed") if key in extra]
    if taken:
        raise DataError(f"extra has the key {taken[0]!r}, which is the report's own; rename it")


def _finite(value: Any) -> Any:
    """Return `value` with floats that are not finite as None, for which JSON has a name."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
