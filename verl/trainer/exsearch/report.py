"""What self-training reports: every iteration's figures, the best one by the dev questions, and the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.evaluation.journal import write_whole
from verl.evaluation.report import markdown, write_report
from verl.trainer.exsearch.config import SelfTrainConfig

if TYPE_CHECKING:
    from verl.trainer.exsearch.outer import Iteration

HISTORY = "metrics.jsonl"
BEST = "exsearch"
"""The best iteration's row, under the name by which the leaderboard knows the paper's figure."""
_CURVES: Mapping[str, tuple[str, ...]] = {
    "answers of the policy": ("test/em", "test/f1", "dev/em", "train/em"),
    "recall of gold passages": ("test/recall", "test/recall_at/1", "test/recall_at/3", "dev/recall"),
    "searching too little, too much": ("test/under_search", "test/over_search", "test/beyond_hops"),
    "searches per question": ("test/searches", "dev/searches"),
    "E-step: mean log p(y|x), sampled": ("estep/log_likelihood",),
    "E-step: effective trajectories a question": ("estep/effective_samples",),
}


def write_self_train_report(
    config: SelfTrainConfig, iterations: Sequence[Iteration], best: Iteration, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `report.png` and `metrics.jsonl` into the run's folder; return the report.

    Methods are the policies in their order, judged on the test questions (on dev ones if there are no others), and the
    best one by the dev questions once more as `exsearch`.
    """
    folder = config.output
    rows = [history_row(one) for one in iterations]
    write_whole(folder / HISTORY, "".join(json.dumps(row) + "\n" for row in rows))
    _plot(rows, folder / "report.png")
    methods = {one.policy.name: one.test or one.dev for one in iterations}
    methods[BEST] = best.test or best.dev
    found = {
        **extra,
        "best": {"iteration": best.policy.epoch, "model": best.policy.model, "metric": config.evaluation.metric},
        "samples": config.sampling.samples,
        "weights": asdict(config.weights),
        "dev": {one.policy.name: one.dev for one in iterations},
        "esteps": {one.policy.name: one.estep for one in iterations if one.estep},
    }
    report = write_report(folder, methods, config.seed, found)
    text = (folder / "report.md").read_text(encoding="utf-8")
    write_whole(folder / "report.md", f"{text}\n{_more(iterations, best, config)}")
    return report


def history_row(one: Iteration) -> dict[str, float]:
    """Return an iteration's figures as one flat row of metrics; what is not known is left out."""
    row: dict[str, float] = {"step": one.policy.epoch}
    for name, found in (("dev", one.dev), ("test", one.test)):
        for key, value in (found or {}).items():
            if key in ("recall_at", "accuracy_by_kind"):
                row |= {f"{name}/{key}/{inner}": entry for inner, entry in value.items()}
            elif isinstance(value, int | float):
                row[f"{name}/{key}"] = float(value)
    if one.estep:
        sampled, weighed = one.estep["inference"], one.estep["format"]
        row |= {f"train/{key}": value / 100 for key, value in sampled["score"].items()}
        row |= {f"estep/{key}": float(value) for key, value in weighed.items() if isinstance(value, int | float)}
        row |= {f"estep/{key}": float(value) for key, value in weighed["reasons"].items()}
        row |= {f"align/{key}": float(one.estep["align"][key]) for key in ("steps", "loss", "seconds")}
    return {key: value for key, value in row.items() if math.isfinite(value)}


def iteration_table(iterations: Sequence[Iteration]) -> list[list[str]]:
    """Return the figures that are ExSearch's own, as rows of cells."""
    heads = ("EM", "F1", "Acc (substring)", "Acc (KILT)", "R@1", "R@3", "under-search", "over-search", "> hops")
    rows = [["policy", *heads, "dev EM", "log p(y|x)", "eff. z"]]
    for one in iterations:
        found = one.test or one.dev
        at = found.get("recall_at") or {}
        weighed = one.estep.get("format", {})
        cells = [found["em"], found["f1"], found["sub_span"], found["kilt"], at.get("1"), at.get("3")]
        cells += [found.get(name) for name in ("under_search", "over_search", "beyond_hops")]
        tail = [weighed.get("log_likelihood"), weighed.get("effective_samples")]
        rows.append(
            [
                one.policy.name,
                *("" if cell is None else f"{100 * cell:.1f}" for cell in cells),
                f"{100 * one.dev['em']:.1f}",
                *("" if cell is None else f"{cell:.2f}" for cell in tail),
            ]
        )
    return rows


def estep_table(iterations: Sequence[Iteration]) -> list[list[str]]:
    """Return what became of every sampled trajectory, as rows of cells."""
    names = sorted({name for one in iterations if one.estep for name in one.estep["format"]["reasons"]})
    last = ("improbable", "questions without weight", "examples", "rows", "too light")
    rows = [["iteration", "questions", "trajectories", *names, *last]]
    for one in iterations:
        if one.estep:
            sampled, weighed = one.estep["inference"], one.estep["format"]
            numbers = [sampled["questions"], sampled["trajectories"]]
            numbers += [weighed["reasons"].get(name, 0) for name in names]
            numbers += [weighed["improbable"], int(weighed["dead_questions"])]
            numbers += [weighed[name] for name in ("examples", "rows", "light")]
            rows.append([one.policy.name, *map(str, numbers)])
    return rows


def _more(iterations: Sequence[Iteration], best: Iteration, config: SelfTrainConfig) -> str:
    parts = ["## Iterations", markdown(iteration_table(iterations))]
    if any(one.estep for one in iterations):
        parts += ["## E-steps", markdown(estep_table(iterations))]
        parts.append(
            "Improbable are trajectories after which the gold answer has less than `weights.min_probability`; "
            "questions without weight are those of which no trajectory could be weighed; rows are the examples with "
            "equal ones merged, those of less than `weights.min_weight` left out.\n"
        )
    parts.append(
        f"Best by dev {config.evaluation.metric}: {best.policy.name}, repeated as `{BEST}`. Figures in %, definitions "
        "in `verl/evaluation/own_answers.py`; log p(y|x) is the sampled bound over the training questions before the "
        "M-step, `eff. z` the effective number of trajectories a question.\n"
    )
    return "\n".join(parts)


def _plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the curves over the iterations, whole or not at all; panels without any point are left out."""
    from matplotlib.figure import Figure  # takes a second

    panels = {title: [key for key in keys if any(key in row for row in rows)] for title, keys in _CURVES.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    height = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 3.2 * height), layout="constrained")
    axes_of = figure.subplots(height, 2, squeeze=False).flat
    for axes, (title, keys) in zip(axes_of, panels.items(), strict=False):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), marker="o", label=key)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
