"""Where metrics go, and that they survive a kill and a resume."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from pathlib import Path

import pytest

from verl.trainer.tracking import Tracker, TrackingConfig, console_line, read_all, read_history

QUIET = TrackingConfig()


def tracked(folder: Path, steps: range, resume_step: int | None = 0, config: TrackingConfig = QUIET) -> Tracker:
    """Log the step's number as a metric for each step, and close."""
    tracker = Tracker(folder, config, {"lr": 0.1}, resume_step)
    for step in steps:
        tracker.log({"m": step}, step)
    tracker.close()
    return tracker


def rows(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["m"]) for row in read_all(folder / "metrics.jsonl")]


def test_every_step_is_a_line_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", QUIET, {})
    tracker.log({"a": 1, "b": 0.5}, 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "a": 1.0, "b": 0.5}]
    tracker.close()


def test_a_resume_drops_the_rows_that_will_be_written_again(tmp_path: Path) -> None:
    tracked(tmp_path, range(6))
    resumed = tracked(tmp_path, range(4, 7), resume_step=3)
    expected = [(float(n), float(n)) for n in range(7)]
    assert rows(tmp_path) == expected
    assert [(row["step"], row["m"]) for row in resumed.history] == expected


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_written_over(tmp_path: Path) -> None:
    tracked(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert rows(tmp_path) == [(1, 1), (2, 2)]
    tracked(tmp_path, range(3, 5), resume_step=2)
    assert rows(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_new_run_sets_an_earlier_file_aside(tmp_path: Path) -> None:
    tracked(tmp_path, range(1, 3))
    tracked(tmp_path, range(1, 2))
    assert rows(tmp_path) == [(1, 1)]
    assert [row["m"] for row in read_all(tmp_path / "metrics.1.jsonl")] == [1, 2]


def test_none_keeps_every_row(tmp_path: Path) -> None:
    tracked(tmp_path, range(5, 6), resume_step=None)
    tracked(tmp_path, range(2, 3), resume_step=None)
    assert rows(tmp_path) == [(5, 5), (2, 2)]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET, {})
    tracker.log({"nan": math.nan, "inf": -math.inf, "fine": 1.0}, 1)
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "nan": None, "inf": None, "fine": 1.0}
    (row,) = read_all(tmp_path / "metrics.jsonl")
    assert math.isnan(row["nan"]) and math.isnan(row["inf"]) and row["fine"] == 1
    resumed = tracked(tmp_path, range(2, 3), resume_step=1)
    assert math.isnan(resumed.history[0]["nan"])
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_there_is_no_history_without_a_file_or_a_resume(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.jsonl", 5) == []
    tracked(tmp_path, range(3))
    assert read_history(tmp_path / "metrics.jsonl", 0) == []


def test_the_console_shows_headline_figures_every_so_many_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(console_every=2), {})
    with caplog.at_level(logging.INFO):
        for step in (1, 2, 3, 4):
            tracker.log({"reward/mean": 0.12345, "timing_s/step": 2.0, "other": 1.0}, step)
    tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 2: reward 0.123, s 2",
        "step 4: reward 0.123, s 2",
    ]
    assert console_line({}, 1) == "step 1: "


def test_wandb_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(backends=("wandb",), name="trial", wandb_mode="offline")
    tracked(tmp_path, range(1, 3), config=config)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # wandb's own process writes the file, and may do so a moment after the run has finished.
    deadline = time.monotonic() + 30
    while b"trial" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    content = record.read_bytes()
    assert b"trial" in content
    assert len(re.findall(rb"_step", content)) >= 2
    assert rows(tmp_path) == [(1, 1), (2, 2)]


def test_an_unknown_backend_and_a_console_that_never_speaks_are_refused() -> None:
    with pytest.raises(ValueError, match="backends names 'mlflow'; known: tensorboard, wandb"):
        TrackingConfig(backends=("mlflow",))
    with pytest.raises(ValueError, match="console_every=0; expected at least 1"):
        TrackingConfig(console_every=0)
