"""One training step, with fakes in the place of workers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.fakes import Learners, Play, Pool, Source, sample, turn
from verl.agent.protocols import Sampling
from verl.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from verl.trainer.estimate import AlgorithmConfig
from verl.trainer.sentinel import RunStopped, Sentinel, SentinelConfig
from verl.trainer.step import StepConfig, Stepper, Stopwatch
from verl.types import Question
from verl.workers.rollout import Sample

GRPO = AlgorithmConfig(estimator="grpo", kl_in_reward=False)
PPO = AlgorithmConfig(estimator="gae")
SAMPLING = Sampling(temperature=0.7, seed=5)


def alternate(asked: Question, k: int) -> Sample:
    """Scores 0, 1, 0, 1, ... within every group."""
    return sample(float(k % 2), asked)


def stepper(
    play: Play = alternate,
    algorithm: AlgorithmConfig = GRPO,
    learners: Learners | None = None,
    source: Source | None = None,
    questions: int = 3,
    samples: int = 2,
    kl: KLController | None = None,
    limits: SentinelConfig | None = None,
    dump: Path | None = None,
    uses_reference: bool = False,
) -> Stepper:
    learners = learners or Learners()
    return Stepper(
        config=StepConfig(questions, samples, SAMPLING, algorithm, uses_reference, pad_id=0),
        source=source or Source(),
        pool=Pool(play, learners.calls),
        learners=learners,
        kl=kl or FixedKLController(0.1),
        sentinel=Sentinel(limits or SentinelConfig()),
        dump=dump,
    )


def test_grpo_asks_for_what_it_needs_in_order() -> None:
    learners = Learners()
    stepper(learners=learners).run(1)
    assert learners.calls == ["collect", "old", "update_actor", "publish 1"]


def test_ppo_with_a_reference_asks_for_everything_in_order() -> None:
    learners = Learners()
    metrics = stepper(algorithm=PPO, learners=learners, uses_reference=True).run(4)
    assert learners.calls == ["collect", "old", "ref", "values", "update_critic", "update_actor", "publish 4"]
    assert metrics["critic/vf_loss"] == 0.25
    assert metrics["critic/kl"] == pytest.approx(0.5)


def test_while_the_critic_warms_up_the_policy_stays_as_it_is() -> None:
    learners = Learners()
    warming = stepper(algorithm=replace(PPO, critic_warmup=2), learners=learners)
    for step in (1, 2, 3):
        warming.run(step)
    assert learners.calls.count("update_critic") == 3
    assert [call for call in learners.calls if call in ("update_actor", "publish 3")] == ["update_actor", "publish 3"]
    assert warming.pool.version == 3


def test_the_update_sees_every_sample_with_its_scores_and_groups() -> None:
    learners = Learners()
    stepper(learners=learners).run(1)
    (batch,) = learners.batches
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    advantage = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert batch.advantages is not None
    assert batch.advantages[:, 2].tolist() == pytest.approx([-advantage, advantage] * 3)
    # Prompt of two tokens, then three sampled ones.
    assert batch.action_mask.tolist() == [[False, False, True, True, True]] * 6
    assert batch.old_logprobs is not None and batch.old_logprobs[0].tolist() == [0, 0, -1, -1, -1]


def test_failed_trajectories_leave_the_batch_and_are_counted() -> None:
    def play(asked: Question, k: int) -> Sample:
        return sample(asked=asked, failed="retriever away") if k == 0 else sample(float(k), asked)

    learners = Learners()
    limits = SentinelConfig(max_failed_share=0.5)
    metrics = stepper(play, learners=learners, samples=3, limits=limits).run(1)
    (batch,) = learners.batches
    assert len(batch) == 6
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert metrics["env/failed"] == 3
    assert metrics["env/trajectories"] == 9
    assert metrics["reward/mean"] == 1.5


def test_what_failures_left_alone_in_its_group_is_not_learned_from() -> None:
    def play(asked: Question, k: int) -> Sample:
        lonely = asked.text == "Who is Q1?" and k == 0
        return sample(asked=asked, failed="away") if lonely else sample(float(k), asked)

    learners = Learners()
    stepper(play, learners=learners).run(1)
    assert learners.batches[0].group_ids.tolist() == [0, 0, 1, 1], "Q1's second sample has nothing to be compared with"
    learners = Learners()
    stepper(play, algorithm=AlgorithmConfig(estimator="reinforce_plus_plus"), learners=learners).run(1)
    assert len(learners.batches[0]) == 5, "an estimator that compares nothing keeps it"


def test_too_many_failures_stop_the_run_with_the_cause_before_any_update(tmp_path: Path) -> None:
    learners = Learners()
    broken = stepper(lambda asked, k: sample(asked=asked, failed="generator away"), learners=learners, dump=tmp_path)
    with pytest.raises(RunStopped, match=r"6 of 6 trajectories failed.*generator away"):
        broken.run(7)
    assert learners.calls == ["collect"]
    assert len((tmp_path / "step_000007.jsonl").read_text().splitlines()) == 6, "the failures are on disk all the same"


def equal_then_different(asked: Question, k: int) -> Sample:
    """Questions with an even number teach nothing."""
    number = int(asked.text.removeprefix("Who is Q").removesuffix("?"))
    return sample(1.0 if number % 2 == 0 else float(k % 2), asked)


def test_dynamic_sampling_draws_again_for_what_it_dropped() -> None:
    source, learners = Source(), Learners()
    drawing = stepper(
        equal_then_different, replace(GRPO, dynamic_sampling=4), learners=learners, source=source, questions=4
    )
    metrics = drawing.run(1)
    # Q0..Q3: two kept; Q4, Q5: one kept; Q6: dropped; Q7: kept.
    assert source.asked_for == [4, 2, 1, 1]
    (batch,) = learners.batches
    assert len(batch) == 8
    assert metrics["env/trajectories"] == 16
    assert metrics["reward/groups_with_variance"] == 0.5


def test_dynamic_sampling_gives_up_after_its_draws_and_learns_from_what_there_is() -> None:
    source, learners = Source(), Learners()
    drawing = stepper(
        equal_then_different, replace(GRPO, dynamic_sampling=2), learners=learners, source=source, questions=4
    )
    drawing.run(1)
    assert source.asked_for == [4, 2]
    assert len(learners.batches[0]) == 6


def test_dynamic_sampling_counts_a_question_that_was_drawn_twice_as_two() -> None:
    source, learners = Source("A"), Learners()
    stepper(alternate, replace(GRPO, dynamic_sampling=3), learners=learners, source=source, questions=2).run(1)
    assert source.asked_for == [2], "both draws of the one question fill the step"
    assert learners.batches[0].group_ids.tolist() == [0, 0, 0, 0], "four samples of one question are one group"


def test_without_any_variance_the_run_stops_and_says_what_to_do() -> None:
    with pytest.raises(RunStopped, match=r"none of 12 trajectories.*dynamic_sampling or rollout.temperature"):
        stepper(lambda asked, k: sample(1.0, asked), replace(GRPO, dynamic_sampling=2)).run(1)


def test_without_dynamic_sampling_groups_of_equal_scores_stay() -> None:
    learners = Learners()
    stepper(lambda asked, k: sample(1.0, asked), learners=learners).run(1)
    assert len(learners.batches[0]) == 6


def test_every_step_and_draw_samples_with_a_seed_of_its_own_that_follows_from_the_step() -> None:
    def seeds(steps: list[int]) -> list[int | None]:
        drawing = stepper(equal_then_different, replace(GRPO, dynamic_sampling=2), questions=4)
        for step in steps:
            drawing.run(step)
        return [sampling.seed for sampling in drawing.pool.samplings]  # type: ignore[attr-defined]

    unbroken = seeds([1, 2, 3])
    assert len(set(unbroken)) == 6
    assert seeds([3]) == unbroken[4:], "a resumed run samples as an unbroken one"


def test_the_sampling_parameters_reach_the_engine() -> None:
    step = stepper()
    step.run(1)
    (sampling,) = step.pool.samplings  # type: ignore[attr-defined]
    assert replace(sampling, seed=5) == SAMPLING


def test_the_timings_add_up_to_the_step() -> None:
    metrics = stepper(algorithm=PPO, uses_reference=True).run(1)
    parts = {name: value for name, value in metrics.items() if name.startswith("timing_s/") and name != "timing_s/step"}
    assert sum(parts.values()) == pytest.approx(metrics["timing_s/step"], rel=1e-9, abs=0)
    stages = {"rollout", "collate", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "sync"}
    assert {name.removeprefix("timing_s/") for name in parts} == stages | {"idle"}
    assert all(value >= 0 for value in parts.values())


def test_a_stage_that_raises_is_timed_and_one_that_comes_twice_is_added_up() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch("a"):
        raise KeyError
    first = watch.seconds["a"]
    with watch("a"):
        pass
    assert watch.seconds["a"] > first > 0


def test_the_mismatch_and_the_age_of_the_sampling_weights_are_measured_on_action_tokens() -> None:
    def play(asked: Question, k: int) -> Sample:
        # Two tokens of version 3 and one of version 1, sampled at -1.25 while the trainer says -1.
        turns = (turn(2, -1.25, found=("T1",), version=3), turn(1, -1.25, version=1, finished=True))
        return sample(float(k), asked, turns=turns)

    step = stepper(play)
    step.pool.version = 3  # type: ignore[misc]
    metrics = step.run(4)
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx(0.25)
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(0.25)
    assert metrics["rollout/staleness"] == pytest.approx(2 / 3)


def test_waiting_and_tokens_are_summed_over_all_trajectories() -> None:
    metrics = stepper().run(1)
    assert metrics["rollout/search_wait_share"] == 0.25
    assert metrics["rollout/reward_wait_share"] == 0.5
    assert metrics["rollout/reward_wait_s"] == 2 * metrics["rollout/search_wait_s"] > 0
    tokens = 1000 * metrics["timing_s/adv"] / metrics["timing_per_token_ms/adv"]
    assert metrics["timing_per_token_ms/rollout"] == pytest.approx(1000 * metrics["timing_s/rollout"] / tokens)
    assert tokens == pytest.approx(round(tokens), abs=1e-3) and tokens > 18
    assert metrics["rollout/tokens_per_second"] == pytest.approx(18 / metrics["rollout/seconds"])
    assert metrics["rollout/dropped_documents"] == 0


def test_the_adaptive_coefficient_follows_the_kl_once_the_policy_moves() -> None:
    kl = AdaptiveKLController(0.1, target=0.25, horizon=100)
    step = stepper(algorithm=replace(PPO, critic_warmup=1), kl=kl, uses_reference=True)
    step.run(1)
    assert kl.coef == 0.1, "while only the critic learns, the KL says nothing"
    step.run(2)
    # KL 0.5 is twice the target: the error is capped at 0.2, over 6 of 100 trajectories.
    assert kl.coef == pytest.approx(0.1 * (1 + 0.2 * 6 / 100))


def test_a_broken_kl_leaves_the_coefficient_alone() -> None:
    kl = AdaptiveKLController(0.1, target=0.25, horizon=100)
    step = stepper(algorithm=PPO, kl=kl, learners=Learners(ref=math.nan), uses_reference=True)
    step.run(1)
    assert kl.coef == 0.1


def test_skipped_updates_in_a_row_stop_the_run() -> None:
    skipping = Learners(stats={"actor/updates": 0.0, "actor/skipped_updates": 2.0})
    step = stepper(learners=skipping, limits=SentinelConfig(max_skipped_updates=3))
    assert step.run(1)["actor/skipped_updates"] == 2
    with pytest.raises(RunStopped, match="4 updates of the actor in a row"):
        step.run(2)


def test_the_trajectories_of_a_step_are_dumped_once(tmp_path: Path) -> None:
    step = stepper(dump=tmp_path)
    step.run(3)
    step.run(3)
    lines = (tmp_path / "step_000003.jsonl").read_text().splitlines()
    assert len(lines) == 6, "a step that is done again replaces its file"
    first = json.loads(lines[0])
    assert first["question"]["id"] == "world/Q3"
    assert first["outcome"]["score"] == 0


def test_trajectories_without_actions_do_not_break_the_step() -> None:
    metrics = stepper(lambda asked, k: sample(float(k), asked, turns=())).run(1)
    assert metrics["rollout/staleness"] == 0
    assert metrics["response_length/max"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_scores_keep_their_order_through_the_batch() -> None:
    # Every sample has a length of its own, so that a mixed-up order would show.
    def play(asked: Question, k: int) -> Sample:
        number = int(asked.text[-2])
        return sample(float(10 * number + k), asked, turns=(turn(1 + 2 * number + k, finished=True),))

    learners = Learners()
    algorithm = AlgorithmConfig(estimator="gae", kl_in_reward=False, whiten=False)
    stepper(play, algorithm, learners).run(1)
    (batch,) = learners.batches
    assert batch.returns is not None
    totals = [row[mask][0].item() for row, mask in zip(batch.returns, batch.action_mask, strict=True)]
    assert totals == pytest.approx([0, 1, 10, 11, 20, 21])
    assert torch.equal(batch.action_mask.sum(dim=1), torch.tensor([1, 2, 3, 4, 5, 6]))


def test_one_step_off_learns_from_samples_one_version_old() -> None:
    played: list[Pool] = []

    def play(asked: Question, k: int) -> Sample:
        return sample(float(k % 2), asked, turns=[turn(version=played[0].version)])

    learners, source = Learners(), Source()
    config = StepConfig(3, 2, SAMPLING, GRPO, uses_reference=False, pad_id=0, mode="one_step_off", last_step=3)
    played.append(Pool(play, learners.calls))
    made = Stepper(config, source, played[0], learners, FixedKLController(0.1), Sentinel(SentinelConfig()))
    assert [made.run(step)["rollout/staleness"] for step in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert source.taken == [f"Q{n}" for n in range(9)]
    assert learners.calls[-1] == "publish 3"
