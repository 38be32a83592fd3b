"""Stages: done once for the same inputs, done anew for others, resumed after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from verl.errors import DataError
from verl.trainer.stages import Stages


class Body:
    """Appends a line to its file and returns how many lines there are."""

    def __init__(self, path: Path, fails: bool = False) -> None:
        self.path = path
        self.fails = fails

    def __call__(self) -> dict[str, Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("line\n")
        if self.fails:
            raise KeyboardInterrupt
        return {"lines": self.lines, "shape": (1, 2)}

    @property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())


def test_a_finished_stage_is_reused_with_its_value(tmp_path: Path) -> None:
    output = tmp_path / "out" / "file"
    first = Stages(tmp_path).run("a", {"seed": 1}, [output.parent], Body(output))
    stages = Stages(tmp_path)
    second = stages.run("a", {"seed": 1}, [output.parent], Body(output))
    assert Body(output).lines == 1
    assert not first.reused and second.reused
    assert first.value == second.value == {"lines": 1, "shape": [1, 2]}
    assert (first.fingerprint, first.seconds) == (second.fingerprint, second.seconds)
    assert stages.seconds == {"a": first.seconds}


def test_other_inputs_delete_the_old_outputs(tmp_path: Path) -> None:
    output, single = tmp_path / "out" / "file", tmp_path / "single"
    Stages(tmp_path).run("a", 1, [output.parent, single], Body(output))
    single.write_text("old")
    done = Stages(tmp_path).run("a", 2, [output.parent, single], Body(output))
    assert done.value["lines"] == 1 and not done.reused
    assert not single.exists()


def test_a_missing_output_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "file"
    Stages(tmp_path).run("a", 1, [output], Body(output))
    output.unlink()
    assert not Stages(tmp_path).run("a", 1, [output], Body(output)).reused
    assert output.exists()


def test_an_interrupted_stage_finds_what_it_left(tmp_path: Path) -> None:
    output = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("a", 1, [output], Body(output, fails=True))
    assert Stages(tmp_path).run("a", 1, [output], Body(output)).value["lines"] == 2
    # With other inputs what is left is of no use.
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("a", 2, [output], Body(output, fails=True))
    assert Stages(tmp_path).run("a", 3, [output], Body(output)).value["lines"] == 1


def test_a_stage_that_is_repeated_unfinished_is_not_reused(tmp_path: Path) -> None:
    output = tmp_path / "file"
    Stages(tmp_path).run("a", 1, [output], Body(output))
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("a", 2, [output], Body(output, fails=True))
    assert not Stages(tmp_path).run("a", 1, [output], Body(output)).reused


def test_work_aside_is_a_stage_of_its_own(tmp_path: Path) -> None:
    # Read when the stage starts, when the services start, when they are up, and when the stage ends.
    stages = Stages(tmp_path, clock=iter([10.0, 11.0, 31.0, 36.5]).__next__)

    def body() -> None:
        with stages.aside("services"):
            assert stages.done == []

    stages.run("a", 1, [], body)
    assert stages.seconds == {"services": 20.0, "a": 6.5}
    assert Stages(tmp_path).run("a", 1, [], body).seconds == 6.5


def test_a_stage_may_not_delete_what_is_not_its_own(tmp_path: Path) -> None:
    folder, foreign = tmp_path / "run", tmp_path / "precious"
    foreign.write_text("keep me")
    with pytest.raises(ValueError, match="is outside"):
        Stages(folder).run("a", 1, [foreign], lambda: None)
    assert foreign.read_text() == "keep me"


def test_a_malformed_memory_is_named(tmp_path: Path) -> None:
    stamp = tmp_path / "stages" / "a.json"
    stamp.parent.mkdir()
    for content in ("not json", "[]", '{"seconds": 1.0}'):
        stamp.write_text(content)
        with pytest.raises(DataError, match=r"a\.json: .*delete the file"):
            Stages(tmp_path).run("a", 1, [], lambda: None)
