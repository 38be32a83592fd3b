"""The leaderboard's plots: accuracy with intervals, against what it costs, and by source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Any]
_COSTS = {"searches": "searches per question", "tokens": "tokens that the searcher sampled per question"}


def draw_plots(methods: Mapping[str, Figures], folder: Path) -> dict[str, Path]:
    """Draw all plots that the figures allow; return their files by caption."""
    from matplotlib.figure import Figure  # takes a second, and only this command draws

    plots = {}
    figure = Figure(figsize=(9, 1 + 0.4 * len(methods)), layout="constrained")
    _bars(figure.subplots(), methods)
    plots["Accuracy with 95 % intervals"] = _saved(figure, folder / "accuracy.png")
    for cost, label in _COSTS.items():
        if any(figures.get(cost) is not None for figures in methods.values()):
            figure = Figure(figsize=(9, 5), layout="constrained")
            _scatter(figure.subplots(), methods, cost, label)
            plots[f"Accuracy against {cost}"] = _saved(figure, folder / f"accuracy_{cost}.png")
    sources = list(dict.fromkeys(source for figures in methods.values() for source in figures.get("by_source", {})))
    if sources:
        figure = Figure(figsize=(3 + 1.1 * len(sources), 1.5 + 0.45 * len(methods)), layout="constrained")
        _heat_map(figure.subplots(), methods, sources)
        plots["Accuracy by source"] = _saved(figure, folder / "accuracy_by_source.png")
    return plots


def _bars(axes: Axes, methods: Mapping[str, Figures]) -> None:
    names = [name for name, figures in methods.items() if figures["accuracy"] is not None][::-1]
    for at, name in enumerate(names):
        value = methods[name]["accuracy"]
        low, high = methods[name].get("accuracy_interval") or (value, value)
        axes.barh(at, 100 * value, color="#4878a8")
        axes.errorbar(
            100 * value, at, xerr=[[100 * (value - low)], [100 * (high - value)]], color="#222", capsize=3, fmt="none"
        )
        axes.text(100 * high + 1, at, f"{100 * value:.1f}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 108)
    axes.set_xlabel("accuracy in %")
    axes.spines[["top", "right"]].set_visible(False)


def _scatter(axes: Axes, methods: Mapping[str, Figures], cost: str, label: str) -> None:
    for at, (name, figures) in enumerate(methods.items()):
        if figures.get(cost) is None or figures["accuracy"] is None:
            continue
        point = (figures[cost], 100 * figures["accuracy"])
        axes.scatter(*point, color="#4878a8", zorder=3)
        # Labels above and below in turn: methods without a searcher all stand at 0.
        axes.annotate(name, point, xytext=(6, 6 if at % 2 else -12), textcoords="offset points", fontsize=9)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy in %")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)


def _heat_map(axes: Axes, methods: Mapping[str, Figures], sources: list[str]) -> None:
    values = [
        [_percent(figures.get("by_source", {}).get(source, {}).get("accuracy")) for source in sources]
        for figures in methods.values()
    ]
    axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:  # a method that was not asked this source has no number
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "black")
    axes.set_xticks(range(len(sources)), sources, rotation=30, ha="right")
    axes.set_yticks(range(len(methods)), list(methods))


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
