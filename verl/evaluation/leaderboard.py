"""One leaderboard out of any number of result folders: a table in markdown and HTML, and plots.

    python -m verl.evaluation.leaderboard output=outputs/leaderboard reports=[outputs/report,outputs/other_report]

A result folder is what `s3 evaluate` wrote. Methods of the same name in several folders are told apart by the folder's.
Where `setting` names one that the papers report, their figures stand in a column of their own, marked as theirs.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from verl.config import run_entry
from verl.errors import DataError
from verl.evaluation.journal import write_whole
from verl.evaluation.leaderboard_plots import draw_plots
from verl.evaluation.paper_numbers import METRIC, PAPER
from verl.evaluation.report import markdown, table

logger = logging.getLogger(__name__)

Setting = Literal["general", "medical", "exsearch", "pubmed", "ctgov"]


@dataclass(frozen=True)
class LeaderboardConfig:
    """What to put together.

    Attributes:
        output: folder of `leaderboard.md`, `leaderboard.html`, `leaderboard.json` and the plots.
        reports: folders with a `report.json`.
        setting: shows the papers' figures beside ours; only where corpus, questions and generator are theirs.
        title: heading of the pages.
    """

    output: Path
    reports: tuple[Path, ...] = ()
    setting: Setting | None = None
    title: str = "Leaderboard"

    def __post_init__(self) -> None:
        if not self.reports:
            raise ValueError("reports is empty; name at least one result folder, reports=[outputs/report]")


def read_reports(folders: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of all methods, the best first: by accuracy, or by the headline of what has none.

    Raises:
        DataError: a folder holds no finished report.
    """
    found: list[tuple[str, Path, Mapping[str, Any]]] = []
    for folder in folders:
        path = folder / "report.json"
        try:
            methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
        except FileNotFoundError as cause:
            raise DataError(f"{folder} holds no report.json, so nothing is scored there; run `s3 evaluate`") from cause
        except (ValueError, KeyError, TypeError) as cause:
            raise DataError(f"{path} cannot be read ({cause}); run `s3 evaluate` again") from cause
        found += [(name, folder, figures) for name, figures in methods.items()]
    times = Counter(name for name, _, _ in found)
    named = {(f"{folder.name}/{name}" if times[name] > 1 else name): figures for name, folder, figures in found}
    if len(named) < len(found):
        raise DataError(
            f"several of {', '.join(map(str, folders))} share their name and their methods; rename a folder"
        )
    return dict(sorted(named.items(), key=lambda item: -_rank_by(item[1])))


def _rank_by(figures: Mapping[str, Any]) -> float:
    headline = figures.get("scores", {}).get(figures.get("headline"), 0.0)
    return headline if figures["accuracy"] is None else figures["accuracy"]


def leaderboard_table(methods: Mapping[str, Mapping[str, Any]], setting: Setting | None) -> list[list[str]]:
    """Return the table as rows of cells, the first one the headings."""
    rows = table(methods)
    if setting is None:
        return rows
    paper, metric = PAPER[setting], METRIC[setting]
    rows[0] += [f"{metric} (ours)", f"{setting} (paper)"]
    for row, (name, figures) in zip(rows[1:], methods.items(), strict=True):
        ours = figures.get(metric)
        row += ["" if ours is None else f"{100 * ours:.1f}", f"{paper[name]:.1f}" if name in paper else ""]
    return rows


def source_table(methods: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return accuracy by source as rows of cells."""
    sources = list(dict.fromkeys(source for figures in methods.values() for source in figures.get("by_source", {})))
    rows = [["method", *sources, "average"]]
    for name, figures in methods.items():
        by_source = figures.get("by_source", {})
        found = [by_source.get(source, {}).get("accuracy") for source in sources]
        cells = ["" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in found]
        average = figures.get("macro_accuracy")
        rows.append([name, *cells, "" if average is None else f"{100 * average:.1f}"])
    return rows


def write_leaderboard(config: LeaderboardConfig) -> Mapping[str, Mapping[str, Any]]:
    """Write tables and plots; return the figures of all methods.

    Raises:
        DataError: as `read_reports`.
    """
    methods = read_reports(config.reports)
    config.output.mkdir(parents=True, exist_ok=True)
    tables = [leaderboard_table(methods, config.setting), source_table(methods)]
    plots = draw_plots(methods, config.output)
    note = (
        f"Columns marked (paper) are the papers' own figures for the setting {config.setting}, "
        "see verl/evaluation/paper_numbers.py; all others were measured here.\n"
        if config.setting
        else ""
    )
    parts = [f"# {config.title}", markdown(tables[0]), note, "## Accuracy by source", markdown(tables[1])]
    parts += [f"![{caption}]({path.name})\n" for caption, path in plots.items()]
    write_whole(config.output / "leaderboard.md", "\n".join(part for part in parts if part))
    write_whole(config.output / "leaderboard.html", _page(config.title, tables, note, plots))
    write_whole(config.output / "leaderboard.json", json.dumps(methods, indent=1))
    logger.info("%d methods in %s", len(methods), config.output)
    return methods


def _page(title: str, tables: Sequence[list[list[str]]], note: str, plots: Mapping[str, Path]) -> str:
    """Return one self-contained page."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
        "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
        "th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #888}img{max-width:100%}"
    )
    body = [f"<h1>{html.escape(title)}</h1>", _html_table(tables[0]), f"<p>{html.escape(note)}</p>" if note else ""]
    body += ["<h2>Accuracy by source</h2>", _html_table(tables[1])]
    for caption, path in plots.items():
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(
            f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("leaderboard", LeaderboardConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: LeaderboardConfig) -> None:
    write_leaderboard(config)


if __name__ == "__main__":
    sys.exit(main())
