"""The first half of the E-step: K trajectories a question from the policy of the moment, kept as they come."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.agent.loop import Tokenizer, derive_seed, run
from verl.agent.protocols import PolicyEngine, Sampling, Search
from verl.errors import SearchAgentError
from verl.evaluation.journal import Journal, Record, Unfinished, question_key, work_through, write_failures
from verl.evaluation.own_answers import ANSWER_METRICS, answer_scores
from verl.trainer.exsearch.config import SamplingConfig
from verl.trainer.exsearch.files import EpochFiles, gold_of, write_json, write_trajectories
from verl.trajectories import trajectory_from_record, trajectory_record
from verl.types import Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger(__name__)


class SamplingFailed(SearchAgentError):
    """Too many trajectories failed for the E-step to say anything; what is finished is kept."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What trajectories are played in."""

    search_config: ExSearchConfig
    engine: PolicyEngine
    search: Search
    tokenizer: Tokenizer


def slice_of(total: int, per_iteration: int | None, epoch: int) -> tuple[int, int]:
    """Return [left, right) of the questions of iteration `epoch` (from 1) in their order `ordered`.

    Iterations take the next ones each; when they come to the end they begin anew.
    """
    size = min(per_iteration or total, total)
    per_round = max(total // size, 1)
    left = ((epoch - 1) % per_round) * size
    return left, left + size


def ordered(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions in the order in which iterations take them."""
    shuffled = list(questions)
    random.Random(f"exsearch/{seed}").shuffle(shuffled)
    return shuffled


async def sample(
    questions: Sequence[Question],
    around: Environment,
    config: SamplingConfig,
    seed: int,
    files: EpochFiles,
    parameters: Mapping[str, Any],
) -> Counter[str]:
    """Play every question K times into the journal, skipping what it holds, then write the two files of the stage.

    A question of which every trajectory failed stays out of the journal, so that the next run of the stage tries it
    again; it is listed in `errors.jsonl` and stays in the denominators.

    Args:
        parameters: what the trajectories depend on; a journal of others is refused.

    Returns:
        Counts: questions, trajectories, failed, all_failed (questions).

    Raises:
        SamplingFailed: the share of failed trajectories exceeds `max_failed_share`.
        DataError: the journal is of other parameters.
    """
    grammar, sampling = ExSearchGrammar(around.search_config), config.sampling(seed)

    async def work(question: Question) -> Record:
        played = await _play(question, around, grammar, sampling, config.samples)
        failed = [trajectory.error for trajectory in played if trajectory.stop is Stop.FAILED]
        if len(failed) == len(played):
            raise Unfinished(f"all {len(played)} trajectories failed, the first with {failed[0]}")
        return {"id": question.id, "trajectories": [trajectory_record(one, with_ids=True) for one in played]}

    at_once = max(1, config.in_flight // config.samples)
    with Journal(files.journal, parameters) as journal:
        failures = await work_through(questions, work, journal, f"E-step {files.epoch}", at_once, config.max_failures)
        write_failures(files.folder / "errors.jsonl", failures)
        counts = _count(questions, journal, config.samples)
        _check_failed(counts, config, failures[0].cause if failures else "some trajectories of many questions failed")
        _write(questions, journal, around.search_config, files, parameters, config.samples)
    return counts


async def _play(
    question: Question, around: Environment, grammar: ExSearchGrammar, sampling: Sampling, samples: int
) -> list[Trajectory]:
    """Play one question K times at once; the samples share their prompt's cache."""
    own = derive_seed(sampling.seed, zlib.crc32(question.id.encode()))
    plays = [
        run(question, grammar, around.engine, around.search, around.tokenizer, _seeded(sampling, derive_seed(own, k)))
        for k in range(samples)
    ]
    return list(await asyncio.gather(*plays))


def _seeded(sampling: Sampling, seed: int | None) -> Sampling:
    return replace(sampling, seed=seed)


def _held(questions: Sequence[Question], journal: Journal) -> Iterator[tuple[Question, list[Record]]]:
    """Stream what the journal holds of the questions: each with the records of its trajectories."""
    for question in questions:
        key = question_key(question)
        if key in journal:
            yield question, journal[key]["trajectories"]


def _count(questions: Sequence[Question], journal: Journal, samples: int) -> Counter[str]:
    counts: Counter[str] = Counter(questions=len(questions), trajectories=len(questions) * samples)
    held = 0
    for _, records in _held(questions, journal):
        held += 1
        counts["failed"] += sum(record.get("stop") == Stop.FAILED.value for record in records)
    counts["all_failed"] = len(questions) - held
    counts["failed"] += counts["all_failed"] * samples
    return counts


def _check_failed(counts: Mapping[str, int], config: SamplingConfig, cause: str) -> None:
    share = counts["failed"] / max(counts["trajectories"], 1)
    if share > config.max_failed_share or counts["all_failed"] == counts["questions"]:
        raise SamplingFailed(
            f"{counts['failed']} of {counts['trajectories']} trajectories failed ({share:.0%}, allowed "
            f"{config.max_failed_share:.0%}); what is finished is kept: mend the cause and run the stage again. {cause}"
        )


def _write(
    questions: Sequence[Question],
    journal: Journal,
    search: ExSearchConfig,
    files: EpochFiles,
    parameters: Mapping[str, Any],
    samples: int,
) -> None:
    """Write `trajectories.jsonl` and the published inference file."""
    grammar, rows, sums = ExSearchGrammar(search), [], Counter[str]()

    def scored() -> Iterator[tuple[int, Trajectory, RewardOutcome]]:
        """Stream all trajectories, each read once, and keep what the published file says of it."""
        for question, records in _held(questions, journal):
            for number, record in enumerate(records):
                trajectory, _ = trajectory_from_record(record)
                outcome = outcome_of(question, trajectory)
                sums.update({name: outcome.parts[name] for name in ANSWER_METRICS})
                rows.append(_published(grammar, number, trajectory, outcome))
                yield number, trajectory, outcome

    write_trajectories(files.trajectories, scored())
    # Trajectories that did not come back are part of the denominator: their answers are wrong.
    total = len(questions) * samples
    score = {name: round(100 * sums[name] / total, 3) for name in ANSWER_METRICS}
    write_json(files.inference, {"score": score, "output": rows, "config": dict(parameters)})


def _published(grammar: ExSearchGrammar, number: int, trajectory: Trajectory, outcome: RewardOutcome) -> dict[str, Any]:
    """Return the trajectory's row of the published inference file."""
    question = trajectory.question
    return {
        "query_id": question.id,
        "trajectory": number,
        "answer": gold_of(question),
        "pred": outcome.answer,
        "messages": grammar.to_messages(question, trajectory.turns),
        "rank": [{"messages": messages} for messages in grammar.rank_messages(trajectory.turns)],
    }


def outcome_of(question: Question, trajectory: Trajectory) -> RewardOutcome:
    """Judge a trajectory's own answer; a failed one has no score."""
    failed = trajectory.error if trajectory.stop is Stop.FAILED else ""
    answer = "" if failed else trajectory.answer or ""
    scores = answer_scores(answer, question.answers)
    return RewardOutcome(scores["f1"], scores, answer, bool(scores["accuracy"]), failed)
