"""The journal: what is finished stays finished, whatever kills the process, and nothing is dropped silently."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import DataError, RetrieverError
from verl.evaluation.journal import (
    Failure,
    Journal,
    Unfinished,
    check_finished,
    fingerprint,
    question_key,
    work_through,
)
from verl.types import Question

PARAMETERS = {"topk": 3, "model": "m"}


def question(number: int, text: str = "Who?") -> Question:
    return Question(f"s/test/{number}", text, ("a",), "s")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "j.jsonl"
    with Journal(path, PARAMETERS) as journal:
        journal.append("a", {"value": 1})
        journal.append("b", {"value": "é\n"})
    with Journal(path, PARAMETERS) as journal:
        assert len(journal) == 2
        assert "a" in journal and "c" not in journal
        assert journal["b"] == {"key": "b", "value": "é\n"}
        journal.append("c", {"value": 3})
        assert journal["a"]["value"] == 1
    assert [line.get("key") for line in lines(path)] == [None, "a", "b", "c"]


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        journal.append("a", {})
        with pytest.raises(ValueError, match="written already"):
            journal.append("a", {})


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_kill_at_any_byte_loses_at_most_the_last_record(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "j.jsonl"
    with Journal(path, PARAMETERS) as journal:
        for key in "abc":
            journal.append(key, {"value": key * 20})
    whole = path.read_bytes()
    kept = whole[: min(cut, len(whole))]
    path.write_bytes(kept)
    with Journal(path, PARAMETERS) as journal:
        assert len(journal) == max(kept.count(b"\n") - 1, 0)
        for key in "abc"[len(journal) :]:
            journal.append(key, {"value": key * 20})
    assert path.read_bytes() == whole


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, PARAMETERS).close()
    with pytest.raises(DataError, match=r"other parameters: topk=3 \(now 8\); restore them"):
        Journal(path, {**PARAMETERS, "topk": 8})
    with pytest.raises(DataError, match=r"seed=None \(now 1\)"):
        Journal(path, {**PARAMETERS, "seed": 1})


def test_an_open_journal_is_refused_to_others(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, PARAMETERS), pytest.raises(DataError, match="open in another process"):
        Journal(path, PARAMETERS)
    Journal(path, PARAMETERS).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"parameters": {"topk": 3, "model": "m"}}\nnot json\n', r"j\.jsonl:2: .*expected one JSON object per line"),
        ('{"parameters": {"topk": 3, "model": "m"}}\n[1]\n', r"j\.jsonl:2: list; expected a JSON object"),
        ('{"parameters": {"topk": 3, "model": "m"}}\n{"value": 1}\n', "key=None; expected a string"),
        ('{"question": "a"}\n', "does not start with the parameters of a journal"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        Journal(path, PARAMETERS)
    assert path.read_text() == content


def test_the_key_changes_with_the_question() -> None:
    assert question_key(question(1)) == question_key(question(1))
    assert question_key(question(1)) != question_key(question(1, "What?"))
    assert question_key(question(1)).startswith("s/test/1#")


def test_fingerprint_ignores_the_order_of_keys_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(Path("x")) == fingerprint("x")


async def test_work_is_done_once_over_several_runs(tmp_path: Path) -> None:
    asked: list[str] = []

    async def work(item: Question) -> dict[str, Any]:
        asked.append(item.id)
        return {"id": item.id}

    questions = [question(number) for number in range(5)]
    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        assert await work_through(questions[:3], work, journal, "first") == []
    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        assert await work_through(questions, work, journal, "second") == []
        assert [journal[question_key(item)]["id"] for item in questions] == [item.id for item in questions]
    assert sorted(asked) == [item.id for item in questions]


async def test_concurrency_is_bounded_and_used(tmp_path: Path) -> None:
    running = peak = 0

    async def work(item: Question) -> dict[str, Any]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        running -= 1
        return {}

    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        await work_through([question(n) for n in range(20)], work, journal, "t", concurrency=4)
    assert peak == 4


async def test_a_failed_question_is_listed_and_tried_again_later(tmp_path: Path) -> None:
    broken = True

    async def work(item: Question) -> dict[str, Any]:
        if broken and item.id.endswith("1"):
            raise RetrieverError("no answer")
        return {}

    questions = [question(n) for n in range(3)]
    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        assert await work_through(questions, work, journal, "t") == [
            Failure("s/test/1", "RetrieverError: no answer"),
        ]
        broken = False
        assert await work_through(questions, work, journal, "t") == []
        assert len(journal) == 3


async def test_too_many_failures_stop_the_run_and_every_question_is_accounted_for(tmp_path: Path) -> None:
    asked: list[str] = []

    async def work(item: Question) -> dict[str, Any]:
        asked.append(item.id)
        await asyncio.sleep(0)
        raise Unfinished("gone")

    questions = [question(n) for n in range(30)]
    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal:
        failures = await work_through(questions, work, journal, "t", concurrency=2, max_failures=4)
    assert [failure.id for failure in failures] == [item.id for item in questions]
    assert len(asked) <= 4 + 1
    assert failures[-1].cause == "not tried: 4 questions had failed before it"


async def test_a_bug_ends_the_run_as_it_is(tmp_path: Path) -> None:
    async def work(item: Question) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    with Journal(tmp_path / "j.jsonl", PARAMETERS) as journal, pytest.raises(ZeroDivisionError):
        await work_through([question(0)], work, journal, "t")


def test_check_finished_writes_the_list_and_removes_it_when_all_is_well(tmp_path: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    with pytest.raises(Unfinished, match=r"t: 1 of 9 questions failed.*run the same command again.*'s/test/1': gone"):
        check_finished([Failure("s/test/1", "gone")], 9, "t", errors)
    assert lines(errors) == [{"id": "s/test/1", "cause": "gone"}]
    check_finished([], 9, "t", errors)
    assert not errors.exists()
