"""The `s3` command: what it finds, how it dispatches, and what it says when there is nothing to find."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from verl.cli import COMMANDS, Command, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_every_command_has_a_main_that_takes_arguments(command: Command) -> None:
    path = ROOT / (command.module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(function.args.args) == 1


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    """A command that returns how many arguments it got, None for none."""
    module = types.ModuleType("echo_command")

    def run(arguments: Sequence[str]) -> int | None:
        return len(arguments) or None

    module.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "echo_command", module)
    return {"echo": Command("echo_command", "count arguments"), "other": Command("no.such.module", "never imported")}


def test_arguments_and_exit_code_pass_through(echo: dict[str, Command]) -> None:
    assert main(["echo", "a=1", "--help", "-x"], echo) == 3
    assert main(["echo"], echo) == 0


def test_help_lists_the_commands(echo: dict[str, Command], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], echo) == 0
    assert capsys.readouterr().out == (
        "usage: s3 COMMAND [ARGUMENTS], or s3 COMMAND --help\n\n  echo   count arguments\n  other  never imported\n"
    )
    assert main([], echo) == 2


def test_an_unknown_command_names_the_nearest(echo: dict[str, Command], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ecko"], echo) == 2
    assert capsys.readouterr().err == "error: unknown command 'ecko'; did you mean 'echo'? Commands: echo, other\n"
