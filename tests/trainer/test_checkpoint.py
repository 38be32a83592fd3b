"""Checkpoints are whole or not there, whatever happens while one is written."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

from verl.errors import CheckpointError
from verl.trainer.checkpoint import Checkpoint, CheckpointConfig, Checkpoints, find, free_name, load


def writer(text: str = "shard") -> object:
    """Write one file into the folder that is given."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "shard").write_text(text)

    return write


def store(folder: Path, **config: object) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**config))  # type: ignore[arg-type]


def save(checkpoints: Checkpoints, step: int, best: float | None = None, text: str = "shard") -> Checkpoint:
    return checkpoints.save(step, {"best": best, "totals": {"n": step}}, writer(text), writer("model"))  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name.removeprefix("step_")) for name in names(folder)]


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = save(store(tmp_path / "c"), 20, best=0.5)
    latest = store(tmp_path / "c").latest()
    assert latest == saved
    assert latest.step == 20
    assert latest.driver["totals"] == {"n": 20}
    assert (latest.learners / "shard").read_text() == "shard"
    assert (latest.export / "shard").read_text() == "model"
    assert names(tmp_path / "c") == ["step_000020"]


def test_the_export_can_be_left_out(tmp_path: Path) -> None:
    assert not save(store(tmp_path, export_hf=False), 1).export.exists()


def test_there_is_nothing_in_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    empty = store(tmp_path / "none")
    assert empty.latest() is None
    assert empty.best() is None
    assert empty.begin("auto") is None
    assert empty.begin("never") is None


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("worker gone"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_the_previous_checkpoint(tmp_path: Path, error: BaseException) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "shard").write_text("half")
        raise error

    checkpoints = store(tmp_path, keep=1)
    save(checkpoints, 1)
    with pytest.raises((CheckpointError, RuntimeError, KeyboardInterrupt)):
        checkpoints.save(2, {}, broken)
    latest = store(tmp_path).latest()
    assert latest is not None
    assert latest.step == 1
    assert save(checkpoints, 2, text="whole").step == 2
    assert (tmp_path / "step_000002" / "learners" / "shard").read_text() == "whole"
    assert names(tmp_path) == ["step_000002"], "what the failed attempt left has been replaced"


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step_000003 could not be written.*No space left.*free some space"):
        store(tmp_path).save(3, {}, full)


@pytest.mark.parametrize("moment", ["learners", "export", "driver"])
def test_kill_9_during_a_write_leaves_the_previous_checkpoint(tmp_path: Path, moment: str) -> None:
    """A process saves step 1, then dies without warning at the given moment of saving step 2."""
    script = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from verl.trainer.checkpoint import CheckpointConfig, Checkpoints

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def write(folder, last=False):
            folder.mkdir()
            (folder / "shard").write_text("half" if last else "whole")
            if last:
                die()

        moment = sys.argv[2]
        checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig(keep=1))
        checkpoints.save(1, {}, write, write)
        if moment == "driver":
            import verl.trainer.checkpoint as module
            module.os.fsync = lambda descriptor: die()
        checkpoints.save(
            2, {}, lambda f: write(f, moment == "learners"), lambda f: write(f, moment == "export")
        )
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c"), moment], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    checkpoints = store(tmp_path / "c", keep=1)
    start = checkpoints.begin("auto")
    assert start is not None and start.step == 1
    assert (start.learners / "shard").read_text() == "whole"
    save(checkpoints, 2, text="again")
    assert names(tmp_path / "c") == ["step_000002"]
    assert (tmp_path / "c" / "step_000002" / "learners" / "shard").read_text() == "again"


def test_the_newest_stay_and_so_does_the_best(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=2)
    for step, metric in enumerate([0.1, 0.9, None, 0.3, 0.2], start=1):
        save(checkpoints, step, best=metric)
    assert steps(tmp_path) == [2, 4, 5]
    best = checkpoints.best()
    assert best is not None and best.step == 2
    save(checkpoints, 6, best=0.95)
    assert steps(tmp_path) == [5, 6], "the old best has been beaten"


def test_the_earliest_of_equals_is_the_best_and_nan_never_is(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    for step, metric in ((1, float("nan")), (2, 0.5), (3, 0.5), (4, float("nan"))):
        save(checkpoints, step, best=metric)
    assert steps(tmp_path) == [2, 4]


def test_without_a_metric_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1, best_metric=None)
    for step in (1, 2, 3):
        save(checkpoints, step, best=1.0 / step)
    assert steps(tmp_path) == [3]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    save(checkpoints, 999_999)
    save(checkpoints, 1_000_000)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 1_000_000
    assert steps(tmp_path) == [1_000_000]


@pytest.mark.parametrize("content", ["", '{"step": 2', "[]", "{}", '{"step": "2"}', "null"])
def test_a_broken_driver_state_is_passed_over(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    broken = save(checkpoints, 2)
    (broken.path / "driver.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    assert "step_000002 is no complete checkpoint" in caplog.text
    assert checkpoints.best() is None


def test_a_checkpoint_without_shards_is_passed_over(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "driver.json").write_text(json.dumps({"step": 2}))
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 1


def test_find_takes_the_latest_none_or_a_path(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    found = find("auto", checkpoints)
    assert found is not None and found.step == 2
    assert find("never", checkpoints) is None
    named = find(str(tmp_path / "step_000001"), checkpoints)
    assert named is not None and named.step == 1
    with pytest.raises(CheckpointError, match="expected a folder step_NNNNNN"):
        find(str(tmp_path / "elsewhere"), checkpoints)


def test_a_run_that_starts_anew_sets_earlier_checkpoints_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = store(folder)
    for name in ("checkpoints.1", "checkpoints.2"):
        save(checkpoints, 7)
        assert checkpoints.begin("never") is None
        assert checkpoints.latest() is None
        assert steps(tmp_path / name) == [7]


def test_a_run_that_goes_back_sets_what_came_later_aside(tmp_path: Path) -> None:
    """Else the newest of the abandoned branch would push out what the run saves, and be resumed from."""
    folder = tmp_path / "checkpoints"
    checkpoints = store(folder, keep=3)
    for step in (10, 20, 30):
        save(checkpoints, step)
    start = checkpoints.begin(str(folder / "step_000010"))
    assert start is not None and start.step == 10
    assert steps(folder) == [10]
    assert steps(tmp_path / "checkpoints.1") == [20, 30]
    assert save(store(folder, keep=1), 15).step == 15
    assert steps(folder) == [15]


def test_a_run_that_continues_another_folder_does_not_mix_with_its_own_past(tmp_path: Path) -> None:
    save(store(tmp_path / "other"), 20)
    save(store(tmp_path / "own"), 5)
    start = store(tmp_path / "own").begin(str(tmp_path / "other" / "step_000020"))
    assert start is not None and start.path.parent.name == "other"
    assert steps(tmp_path / "own.1") == [5]
    assert store(tmp_path / "own").latest() is None, "so a restart goes back to the other folder's checkpoint"
    assert steps(tmp_path / "other") == [20]


def test_a_resume_keeps_everything_up_to_its_step_and_no_broken_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = store(folder, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    (folder / "step_000003").mkdir()
    start = checkpoints.begin("auto")
    assert start is not None and start.step == 2
    assert steps(folder) == [1, 2]


def test_leftovers_under_other_names_are_ignored(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    for name in (".step_000009.partial", ".step_000001.dropped", "step_9", "notes", "step_000009.bak"):
        (tmp_path / name).mkdir(parents=True)
    save(checkpoints, 1)
    save(checkpoints, 2)
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2
    assert "step_000001" not in names(tmp_path)
    assert ".step_000001.dropped" not in names(tmp_path)


def test_load_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder step_NNNNNN"):
        load(tmp_path)


def test_free_names_keep_the_suffix(tmp_path: Path) -> None:
    def touched(paths: Iterable[Path]) -> list[str]:
        return [path.name for path in paths if not path.touch()]

    path = tmp_path / "metrics.jsonl"
    assert touched(free_name(path) for _ in range(2)) == ["metrics.1.jsonl", "metrics.2.jsonl"]


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"save_freq": -1}])
def test_a_policy_that_could_lose_everything_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        CheckpointConfig(**wrong)  # type: ignore[arg-type]


def test_steps_that_other_runs_start_from_are_saved_and_stay(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1, best_metric=None, save_freq=4, keep_steps=(2, 3))
    config = CheckpointConfig(save_freq=4, keep_steps=(2, 3))
    assert [step for step in range(1, 10) if config.due(step)] == [2, 3, 4, 8]
    for step in (2, 3, 4, 8):
        save(checkpoints, step)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000003", "step_000008"]
    with pytest.raises(ValueError, match=r"keep_steps=\[0\]"):
        CheckpointConfig(keep_steps=(0,))
