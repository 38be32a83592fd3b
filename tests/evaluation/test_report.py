"""Reports: the exact layout of report.json, the tables, and the picture of the curves."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from verl.errors import DataError
from verl.evaluation.report import markdown, plain, plot_curves, plot_runs, stage_table, table, write_report

FIGURES: dict[str, Any] = {"accuracy": 0.5, "recall": 0.25, "searches": 1.0, "n": 400, "seconds": 12.34}


def test_report_json_has_the_stated_layout(tmp_path: Path) -> None:
    methods = {"naive_rag": FIGURES, "oracle": {**FIGURES, "recall": None, "em": 0.1}}
    written = write_report(tmp_path, methods, seed=7, extra={"training": {"steps": 20, "loss": math.nan}})
    assert json.loads((tmp_path / "report.json").read_text()) == written
    assert written == {"methods": methods, "seed": 7, "training": {"steps": 20, "loss": None}}
    assert list(written["methods"]) == ["naive_rag", "oracle"]


def test_report_md_holds_both_tables(tmp_path: Path) -> None:
    write_report(tmp_path, {"a|b": FIGURES}, 7, {"stages": {"world": 0.26, "index": 1.0}})
    text = (tmp_path / "report.md").read_text()
    assert "| method | accuracy | recall | searches | n | seconds |\n|---|---:|---:|---:|---:|---:|\n" in text
    assert "| a\\|b | 50.0 | 25.0 | 1.00 | 400 | 12.3 |\n" in text
    assert "| world | 0.3 |\n| index | 1.0 |\n| total | 1.3 |\n" in text
    assert text.endswith("Seed 7.\n")


def test_optional_figures_get_columns_of_their_own() -> None:
    methods = {
        "a": {**FIGURES, "accuracy_interval": [0.4, 0.625], "accuracy_by_kind": {"1-hop": 1.0, "2-hop": 0.0}},
        "b": {**FIGURES, "recall": None, "documents": 3.25},
    }
    assert table(methods) == [
        ["method", "accuracy", "95 %", "1-hop", "2-hop", "recall", "documents", "searches", "n", "seconds"],
        ["a", "50.0", "40.0–62.5", "100.0", "0.0", "25.0", "", "1.00", "400", "12.3"],
        ["b", "50.0", "", "", "", "", "3.2", "1.00", "400", "12.3"],
    ]


def test_what_was_not_measured_is_an_empty_cell(tmp_path: Path) -> None:
    unmeasured = {**FIGURES, "accuracy": math.nan, "searches": math.nan}
    assert write_report(tmp_path, {"a": unmeasured}, 0)["methods"]["a"]["accuracy"] is None
    assert "| a |  | 25.0 |  | 400 | 12.3 |" in (tmp_path / "report.md").read_text()


def test_the_console_table_is_aligned() -> None:
    assert plain([["method", "n"], ["naive_rag", "1"], ["x", "400"]]) == (
        "method       n\n---------  ---\nnaive_rag    1\nx          400\n"
    )


def test_stages_are_summed() -> None:
    assert stage_table({"a": 1.04, "b": 2.0}) == [["stage", "seconds"], ["a", "1.0"], ["b", "2.0"], ["total", "3.0"]]
    assert markdown([["h"], ["x"]]) == "| h |\n|---|\n| x |\n"


@pytest.mark.parametrize("missing", ["accuracy", "recall", "searches", "n", "seconds"])
def test_a_missing_figure_is_named(tmp_path: Path, missing: str) -> None:
    figures = {key: value for key, value in FIGURES.items() if key != missing}
    with pytest.raises(DataError, match=f"method 'a' lacks {missing};"):
        write_report(tmp_path, {"a": figures}, 0)
    assert not list(tmp_path.iterdir())


def test_extra_may_not_hide_the_reports_own_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'seed', which is the report's own"):
        write_report(tmp_path, {"a": FIGURES}, 0, {"seed": 1})


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


HISTORY = [
    {"step": 1, "reward/mean": 0.1, "timing_s/rollout": 2.0, "timing_s/update": 1.0},
    {"step": 2, "reward/mean": math.nan, "timing_s/rollout": 2.5, "actor/entropy_loss": 0.4},
]


def test_curves_of_one_and_of_several_runs_are_drawn(tmp_path: Path) -> None:
    plot_curves(HISTORY, tmp_path / "plots" / "report.png")
    wide, two_rows = png_size(tmp_path / "plots" / "report.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["report.png"]
    # Three panels make two rows, two make one.
    plot_runs({"seed 0": HISTORY[:1], "seed 1": [{"step": 1, "reward/mean": 0.3}]}, tmp_path / "seeds.png")
    one_run_of_rewards, one_row = png_size(tmp_path / "seeds.png")
    assert wide == one_run_of_rewards
    assert one_row < two_rows


def test_a_history_without_any_curve_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has any of reward/mean"):
        plot_curves([{"step": 1, "other": 1.0}], tmp_path / "report.png")
    with pytest.raises(DataError, match="log at least one step first"):
        plot_curves([], tmp_path / "report.png")
