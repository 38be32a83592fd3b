"""What a finished fine-tuning reports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.evaluation.journal import write_whole
from verl.evaluation.report import markdown
from verl.trainer.tracking import HISTORY, read_all
from verl.typed import encode

_PANELS = (("loss", ("sft/loss", "val/loss")), ("learning rate", ("sft/lr",)), ("gradient norm", ("sft/grad_norm",)))


def write_sft_report(folder: Path, summary: Any, config: Mapping[str, Any]) -> None:
    """Write report.md, report.json and report.png into `folder`.

    Args:
        summary: a `verl.trainer.sft.SftSummary`.
        config: the composed configuration.
    """
    figures = encode(summary, nan_as_null=True)
    history = read_all(folder / HISTORY)
    write_whole(folder / "report.json", json.dumps({"sft": figures, "config": config}, indent=2) + "\n")
    write_whole(folder / "report.md", _markdown(figures))
    plot(history, folder / "report.png")


def plot(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the curves of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(_PANELS), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, keys) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in history if math.isfinite(row.get(key, math.nan))]
            if points:
                axes.plot(*zip(*points, strict=True), label=key)
        axes.set_title(title)
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _markdown(figures: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in figures["dropped"].items())
    seconds = figures["seconds"]
    rows = [
        ["examples", f"{figures['examples']} (dropped: {dropped}; cut: {figures['cut']})"],
        ["steps", f"{figures['steps']} (skipped: {figures['skipped_updates']})"],
        ["tokens", str(figures["tokens"])],
        ["seconds", f"{seconds:.1f}"],
        ["tokens per second", f"{figures['tokens'] / seconds:.0f}" if seconds else "–"],
        ["last loss", _number(figures["loss"])],
        *([f"validation {name}", _number(value)] for name, value in figures["validation"].items()),
        ["model", f"`{Path(figures['model']).name}/`"],
    ]
    return "# Supervised fine-tuning\n\n" + markdown([["", ""], *rows]) + "\n![curves](report.png)\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
