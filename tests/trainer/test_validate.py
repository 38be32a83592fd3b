from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.fakes import Pool, question, sample, turn
from verl.agent.protocols import Sampling
from verl.trainer.sentinel import RunStopped, Sentinel, SentinelConfig
from verl.trainer.validate import Validator, validation_metrics
from verl.trajectories import iter_trajectories
from verl.types import Question
from verl.workers.rollout import Sample

QUESTIONS = [question("A", "1-hop"), question("B", "2-hop"), question("C", "2-hop"), question("D", "")]
GREEDY = Sampling(temperature=0.0, seed=3)


def play(asked: Question, k: int) -> Sample:
    """Only B is answered."""
    return sample(2.0 if asked.text == "Who is B?" else 0.0, asked)


def validator(folder: Path, limit: float = 0.2) -> Validator:
    return Validator(QUESTIONS, GREEDY, folder, Sentinel(SentinelConfig(max_failed_share=limit)))


def test_every_question_is_played_once_with_the_evaluation_sampling(tmp_path: Path) -> None:
    pool = Pool(play)
    metrics = validator(tmp_path).run(pool, 20)
    assert pool.samplings == [GREEDY]
    assert metrics["val/n"] == 4
    assert metrics["val/accuracy"] == 0.25
    assert metrics["val/accuracy/1-hop"] == 0
    assert metrics["val/accuracy/2-hop"] == 0.5
    assert metrics["val/score"] == 0.5
    assert metrics["val/searches"] == 0
    assert metrics["val/response_length/mean"] == 3
    assert "val/accuracy/" not in metrics


def test_generations_are_dumped_and_a_repeated_validation_replaces_them(tmp_path: Path) -> None:
    for _ in range(2):
        validator(tmp_path / "validation").run(Pool(play), 20)
    dumped = list(iter_trajectories(tmp_path / "validation" / "step_000020.jsonl"))
    assert [trajectory.question.id for trajectory, _ in dumped] == ["world/A", "world/B", "world/C", "world/D"]
    outcome = dumped[1][1]
    assert outcome is not None and outcome.score == 2


def test_a_failed_question_is_counted_and_left_out() -> None:
    samples = [sample(1.0, QUESTIONS[0]), sample(asked=QUESTIONS[1], failed="away")]
    metrics = validation_metrics(samples)
    assert metrics["val/failed"] == 1
    assert metrics["val/accuracy"] == 1
    assert "val/accuracy/2-hop" not in metrics


def of(source: str, score: float, kind: str = "", **parts: float) -> Sample:
    named = {name.replace("_at_", "@"): value for name, value in parts.items()}
    asked = Question(f"{source}/0", "?", ("a",), source, kind=kind)
    return sample(score, asked, parts=named)


def test_the_parts_of_the_reward_are_reported_for_every_task() -> None:
    metrics = validation_metrics(
        [
            of("pubmed", 6.0, recall=0.75, format_error_ratio=0.0),
            of("pubmed", -4.0, recall=0.0, format_error_ratio=1.0),
            of("squad", 5.0, hit_at_5=0.0, hit_at_20=1.0),
            of("scifact_val", 0.6, ndcg=0.5, recall=1.0),
            of("bird_val", 1.1, accuracy=1.0, kind="hard"),
            of("bird_val", 0.4, accuracy=0.0, kind="hard"),
            of("ctgov", 0.0, documents=99.0),
        ]
    )
    expected = {
        "val/recall": 1.75 / 3,
        "val/format_error_ratio": 0.5,
        "val/hit@20": 1.0,
        "val/recall@20": 1.0,
        "val/recall@5": 0.0,
        "val/ndcg": 0.5,
        "val/test_score/pubmed": 0.375,
        "val/test_score/squad": 5.0,
        "val/test_score/scifact_val": 0.5,
        "val/test_score/bird_val": 0.5,
        "val/test_score/ctgov": 0.0,
        "val/accuracy/hard": 0.5,
        "val/score": (6 - 4 + 5 + 0.6 + 1.1 + 0.4) / 7,
        "val/documents": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "val/recall@50" not in metrics
    assert metrics["val/accuracy"] == 0.5, "of those that have one"


def test_rejections_are_counted_and_dumped(tmp_path: Path) -> None:
    def reject(asked: Question, k: int) -> Sample:
        said = turn(finished=True, invalid=True, note="the answer is not JSON: 'q'", fault="not_json")
        return sample(-4.0, asked, turns=(said,))

    metrics = validator(tmp_path).run(Pool(reject), 0)
    assert metrics["val/rejected/not_json"] == 1.0
    trajectory, _ = next(iter_trajectories(tmp_path / "step_000000.jsonl"))
    assert (trajectory.turns[0].note, trajectory.turns[0].fault) == ("the answer is not JSON: 'q'", "not_json")


def test_nothing_scored_has_no_accuracy() -> None:
    assert validation_metrics([sample(failed="away")]) == {"val/n": 1, "val/failed": 1}
    assert validation_metrics([]) == {"val/n": 0, "val/failed": 0}


def test_a_dead_service_stops_the_run_instead_of_an_accuracy_over_the_rest(tmp_path: Path) -> None:
    def half(asked: Question, k: int) -> Sample:
        return play(asked, k) if asked.kind == "2-hop" else sample(asked=asked, failed="generator away")

    with pytest.raises(RunStopped, match=r"2 of 4 .*generator away"):
        validator(tmp_path).run(Pool(half), 20)
    assert (tmp_path / "step_000020.jsonl").exists()
    assert validator(tmp_path, limit=0.5).run(Pool(half), 20)["val/accuracy"] == 0.5
