"""The leaderboard: which rows it has, what stands in them, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl.evaluation.leaderboard import LeaderboardConfig, main, source_table, write_leaderboard
from verl.evaluation.report import write_report

FIGURES: dict[str, Any] = {"accuracy": 0.5, "recall": 0.25, "searches": 1.0, "n": 4, "seconds": 1.0}


def figures(accuracy: float, **sources: float) -> dict[str, Any]:
    by_source = {source: {"accuracy": value, "n": 2} for source, value in sources.items()}
    average = sum(sources.values()) / len(sources)
    interval = [accuracy - 0.1, accuracy + 0.1]
    costs = {"tokens": 10.0, "documents": 3.0}
    return {
        **FIGURES,
        **costs,
        "accuracy": accuracy,
        "by_source": by_source,
        "macro_accuracy": average,
        "accuracy_interval": interval,
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "one", tmp_path / "two"
    write_report(one, {"naive_rag": figures(0.4, nq=0.25, pop=0.55), "search_r1": figures(0.7, nq=0.6, pop=0.8)}, 0)
    write_report(two, {"naive_rag": figures(0.5, nq=0.5), "a|<b>": figures(0.9, hotpot=0.9)}, 1)
    return one, two


def test_rows_are_sorted_and_told_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    methods = write_leaderboard(LeaderboardConfig(tmp_path / "out", folders))
    assert list(methods) == ["a|<b>", "search_r1", "two/naive_rag", "one/naive_rag"]
    assert source_table(methods) == [
        ["method", "hotpot", "nq", "pop", "average"],
        ["a|<b>", "90.0", "", "", "90.0"],
        ["search_r1", "", "60.0", "80.0", "70.0"],
        ["two/naive_rag", "", "50.0", "", "50.0"],
        ["one/naive_rag", "", "25.0", "55.0", "40.0"],
    ]
    assert json.loads((tmp_path / "out" / "leaderboard.json").read_text()) == dict(methods)


def test_reports_without_answers_have_no_accuracy_and_no_bar(tmp_path: Path) -> None:
    silent = {**figures(0.5, nq=0.5), "accuracy": None, "accuracy_interval": None, "macro_accuracy": None}
    silent["by_source"] = {"nq": {"accuracy": None, "n": 2}}
    write_report(tmp_path / "one", {"bm25": silent, "rag": figures(0.4, nq=0.4)}, 0)
    methods = write_leaderboard(LeaderboardConfig(tmp_path / "out", (tmp_path / "one",)))
    assert source_table(methods) == [["method", "nq", "average"], ["rag", "40.0", "40.0"], ["bm25", "", ""]]


def test_the_page_is_whole_and_safe(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_leaderboard(LeaderboardConfig(tmp_path / "out", folders, title="Mine & yours"))
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "<title>Mine &amp; yours</title>" in page and "a|&lt;b&gt;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "| a\\|<b> | 90.0 | 80.0–100.0 |" in text and "(paper)" not in text
    for name in ("accuracy", "accuracy_searches", "accuracy_tokens", "accuracy_by_source"):
        assert f"]({name}.png)" in text and (tmp_path / "out" / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_the_papers_figures_are_marked_as_theirs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_leaderboard(LeaderboardConfig(tmp_path / "out", folders[:1], setting="general"))
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.endswith("| macro_accuracy (ours) | general (paper) |")
    assert rows[0].endswith("| 70.0 | 57.8 |") and rows[1].endswith("| 40.0 | 51.1 |")
    assert "the papers' own figures for the setting general" in text


def test_a_folder_that_is_not_scored_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output={tmp_path}", f"reports=[{tmp_path / 'none'}]"]) == 1
    assert "holds no report.json, so nothing is scored there; run `s3 evaluate`" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{}")
    assert main([f"output={tmp_path}", f"reports=[{tmp_path}]"]) == 1
    assert main([f"output={tmp_path}"]) == 2


def test_folders_that_cannot_be_told_apart_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parent in ("a", "b"):
        write_report(tmp_path / parent / "report", {"rag": FIGURES}, 0)
    both = f"reports=[{tmp_path / 'a' / 'report'},{tmp_path / 'b' / 'report'}]"
    assert main([f"output={tmp_path}", both]) == 1
    assert "rename a folder" in capsys.readouterr().err
