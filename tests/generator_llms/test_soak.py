"""A small version of the cache's soak; the large one is `scripts/bench/cache_soak.py` itself."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "cache_soak.py"


@pytest.fixture
def cache_soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script under a name that the processes it starts can import too."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("cache_soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cache_soak", module)
    spec.loader.exec_module(module)
    return module


def test_killed_processes_lose_nothing_and_disturb_nobody(cache_soak: ModuleType, tmp_path: Path) -> None:
    verdict = cache_soak.soak(cache_soak.Settings(scores=600, processes=3, kills=2), tmp_path)
    assert verdict.passed, str(verdict)
    assert (verdict.asked, verdict.kills, verdict.lost, verdict.wrong) == (600, 2, 0, 0)


def test_a_lost_or_wrong_entry_is_found(cache_soak: ModuleType, tmp_path: Path) -> None:
    settings = cache_soak.Settings(scores=40, processes=2, kills=0)
    assert cache_soak.soak(settings, tmp_path).passed
    answers = [cache_soak.answer_to(f"question {number}") for number in range(10)]
    with closing(sqlite3.connect(tmp_path / "replies.sqlite")) as connection, connection:
        connection.execute("DELETE FROM replies WHERE reply LIKE ?", (f"%{answers[0]}%",))
        connection.execute("""UPDATE replies SET reply = replace(reply, '"yes"', '"no"')""")
        for name in ("unasked", "neither"):
            copy = "INSERT INTO replies SELECT ?, model, reply, created, used FROM replies LIMIT 1"
            connection.execute(copy, (name,))
    verdict = cache_soak.judge(settings, tmp_path, 0, 1.0)
    misjudged = sum(map(cache_soak.verdict_on, answers[1:]))
    assert not verdict.passed and misjudged > 0
    assert (verdict.entries, verdict.lost, verdict.wrong) == (21, 1, misjudged + 1)


def test_every_question_is_shared_with_a_neighbour_and_asked_twice(cache_soak: ModuleType) -> None:
    settings = cache_soak.Settings(scores=1600, processes=4, kills=0)
    asked = [settings.questions(process) for process in range(4)]
    assert [len(questions) for questions in asked] == [400] * 4
    assert all(len(set(questions)) == 200 for questions in asked)
    assert len(set(asked[0]) & set(asked[1])) == 100
