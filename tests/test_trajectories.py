"""Trajectory dumps: exact round trip with ids, a lean form without, and malformed lines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import DataError
from verl.trajectories import append_trajectories, iter_trajectories, trajectory_from_record, trajectory_record
from verl.types import (
    Baseline,
    Document,
    Question,
    RewardOutcome,
    Role,
    SearchResult,
    Segment,
    Stop,
    Trajectory,
    Turn,
)

TEXT = st.text(max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)
DOCUMENTS = st.lists(st.builds(Document, id=TEXT, title=TEXT, text=TEXT), max_size=2).map(tuple)
RESULTS = st.builds(SearchResult, query=TEXT, documents=DOCUMENTS, scores=st.lists(FLOATS, max_size=2).map(tuple))
SEGMENTS = st.builds(Segment, ids=IDS, role=st.sampled_from(Role), logprobs=st.lists(FLOATS, max_size=3).map(tuple))
TURNS = st.builds(
    Turn,
    segments=st.lists(SEGMENTS, max_size=2).map(tuple),
    text=TEXT,
    query=st.none() | TEXT,
    selected=st.none() | IDS,
    finished=st.booleans(),
    result=st.none() | RESULTS,
)
BASELINES = st.builds(Baseline, documents=DOCUMENTS, answer=TEXT, correct=st.booleans())
TRAJECTORIES = st.builds(
    Trajectory,
    question=st.builds(
        Question, id=TEXT, text=TEXT, answers=st.just(("a",)), source=TEXT, baseline=st.none() | BASELINES
    ),
    prompt_ids=IDS,
    turns=st.lists(TURNS, max_size=3).map(tuple),
    stop=st.sampled_from(Stop),
    documents=DOCUMENTS,
    error=TEXT,
)
OUTCOMES = st.builds(RewardOutcome, score=FLOATS, parts=st.dictionaries(TEXT, FLOATS), answer=TEXT, failed=TEXT)
SIMPLE = Trajectory(
    question=Question("w/t/0", "q?", ("a",), "w"),
    prompt_ids=(1, 2),
    turns=(Turn(segments=(Segment((3,), Role.POLICY, (-0.5,), 4),), text="x", selected=()),),
    stop=Stop.FINISHED,
)


@given(TRAJECTORIES, st.none() | OUTCOMES)
def test_records_round_trip_through_json(trajectory: Trajectory, outcome: RewardOutcome | None) -> None:
    line = json.dumps(trajectory_record(trajectory, outcome, with_ids=True), allow_nan=False)
    assert trajectory_from_record(json.loads(line)) == (trajectory, outcome)


@given(TRAJECTORIES)
def test_without_ids_everything_but_tokens_is_kept(trajectory: Trajectory) -> None:
    lean, _ = trajectory_from_record(trajectory_record(trajectory))
    turns = tuple(replace(turn, segments=()) for turn in trajectory.turns)
    assert lean == replace(trajectory, prompt_ids=(), turns=turns)


def test_record_is_plain_json() -> None:
    record = trajectory_record(SIMPLE, RewardOutcome(2.0, {"gbr": 1.0}, "a", True), with_ids=True)
    assert record["stop"] == "finished"
    assert record["turns"][0]["segments"] == [{"ids": [3], "role": "policy", "logprobs": [-0.5], "weight_version": 4}]
    assert record["turns"][0]["selected"] == []
    assert record["turns"][0]["query"] is None
    assert record["outcome"] == {"score": 2.0, "parts": {"gbr": 1.0}, "answer": "a", "correct": True, "failed": ""}


def test_a_score_that_is_not_finite_becomes_null_and_reads_as_nan() -> None:
    record = trajectory_record(SIMPLE, RewardOutcome(math.nan, failed="generator timed out"))
    assert record["outcome"]["score"] is None
    _, outcome = trajectory_from_record(record)
    assert outcome is not None and math.isnan(outcome.score)


@pytest.mark.parametrize(
    ("ids", "logprobs", "wrong"),
    [
        ([1, True], [0.0, 0.0], "ids"),
        ([1, 2.0], [0.0, 0.0], "ids"),
        ([1, None], [0.0, 0.0], "ids"),
        ([1, 2], [0.0, "0"], "logprobs"),
    ],
)
def test_one_wrong_number_among_many_is_named(ids: list[Any], logprobs: list[Any], wrong: str) -> None:
    record = trajectory_record(SIMPLE, with_ids=True)
    record["turns"][0]["segments"][0] |= {"ids": ids, "logprobs": logprobs}
    with pytest.raises(DataError, match=rf"turns\[0\]\.segments\[0\]\.{wrong}\[1\]"):
        trajectory_from_record(record)


def test_log_probabilities_that_are_not_finite_or_whole_are_kept() -> None:
    record = trajectory_record(SIMPLE, with_ids=True)
    record["turns"][0]["segments"][0] |= {"ids": [1, 2, 3], "logprobs": [None, -1, -0.5]}
    trajectory, _ = trajectory_from_record(record)
    logprobs = trajectory.turns[0].segments[0].logprobs
    assert math.isnan(logprobs[0]) and logprobs[1:] == (-1.0, -0.5) and type(logprobs[1]) is float
    encoded = trajectory_record(trajectory, with_ids=True)["turns"][0]["segments"][0]
    assert encoded["logprobs"] == [None, -1.0, -0.5]


def test_lines_are_appended_and_streamed(tmp_path: Path) -> None:
    path = tmp_path / "dump" / "step_1.jsonl"
    assert append_trajectories(path, [(SIMPLE, None)], with_ids=True) == 1
    assert append_trajectories(path, [(SIMPLE, RewardOutcome(1.0))] * 2, with_ids=True) == 2
    assert list(iter_trajectories(path)) == [(SIMPLE, None)] + [(SIMPLE, RewardOutcome(1.0))] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object per line"),
        ("[]", "list; expected a JSON object"),
        ("{}", "missing required key 'question.id'"),
        ('{"stops": 1}', "unknown key 'stops'; did you mean 'stop'?"),
        (json.dumps(trajectory_record(SIMPLE) | {"stop": "finnished"}), "did you mean 'finished'?"),
        (json.dumps(trajectory_record(SIMPLE) | {"outcome": {"score": "high"}}), "outcome.score='high'"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    append_trajectories(path, [(SIMPLE, None)])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as caught:
        list(iter_trajectories(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        next(iter_trajectories(tmp_path / "none.jsonl"))
