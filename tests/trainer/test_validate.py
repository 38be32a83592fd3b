from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.fakes import Pool, question, sample
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
