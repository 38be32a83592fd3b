"""Trajectories and their log-probabilities to weighted examples, in the published layout and as token rows."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from verl.agent.grammar.base import Message
from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.algorithms.weights import Candidates, trajectory_weights
from verl.errors import DataError
from verl.trainer.exsearch.config import ScoringConfig, WeightsConfig
from verl.trainer.exsearch.files import EpochFiles, Key, by_key, read_json, read_trajectories, write_json
from verl.trainer.exsearch.score import answer_ids, context_of
from verl.trainer.sft_chat import encode_chat
from verl.types import RewardOutcome, Role, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One example of the M-step.

    Attributes:
        kind: `trajectory`, or `rank` for a choice of documents, which has its trajectory's weight.
        messages: in the published layout.
    """

    key: Key
    kind: str
    weight: float
    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    messages: Sequence[Message]

    def row(self) -> dict[str, Any]:
        """Return the token row, as `verl.trainer.sft_data` reads it."""
        mask = [int(mark) for mark in self.learned]
        return {
            "query_id": self.key[0],
            "trajectory": self.key[1],
            "kind": self.kind,
            "input_ids": list(self.ids),
            "loss_mask": mask,
            "weight": self.weight,
        }

    def published(self) -> dict[str, Any]:
        """Return the published row; the M-step of the released code weighs it by exp(-prob)."""
        return {
            "query_id": self.key[0],
            "trajectory": self.key[1],
            "messages": list(self.messages),
            # A weight above 1 (no weighting here makes one) would need a negative prob.
            "prob": max(0.0, -math.log(self.weight)),
        }


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes examples of trajectories."""

    tokenizer: PreTrainedTokenizerBase
    search: ExSearchConfig
    scoring: ScoringConfig
    weights: WeightsConfig

    def examples(self, key: Key, trajectory: Trajectory, weight: float, gold: str) -> Iterator[Example]:
        """Yield a trajectory's examples: itself with its last turn, and its choices of documents."""
        grammar = ExSearchGrammar(self.search)
        messages = grammar.to_messages(trajectory.question, trajectory.turns)
        if self.weights.answer == "gold":
            messages[-1] = {"role": "assistant", "content": gold}
        if any(turn.prompt_ids for turn in trajectory.turns):
            # The policy read several conversations; the dialogue that they stand for is written anew.
            ids, learned = encode_chat(self.tokenizer, messages)
        else:
            ids, learned = self._tokens(trajectory, gold)
        yield Example(key, "trajectory", weight, tuple(ids), tuple(learned), messages)
        for pair in grammar.rank_messages(trajectory.turns):
            ids, learned = encode_chat(self.tokenizer, pair)
            yield Example(key, "rank", weight, tuple(ids), tuple(learned), pair)

    def _tokens(self, trajectory: Trajectory, gold: str) -> tuple[list[int], list[bool]]:
        """Return what was read and sampled, and which of it the policy wrote; the answer exchanged if configured."""
        before = trajectory.turns[:-1]
        ids, learned = list(trajectory.prompt_ids), [False] * len(trajectory.prompt_ids)
        for part in (segment for turn in before for segment in turn.segments):
            ids.extend(part.ids)
            learned.extend([part.role is Role.POLICY] * len(part.ids))
        assert len(ids) == len(context_of(trajectory))
        if self.weights.answer == "gold":
            answer = [*answer_ids(gold, self.tokenizer, self.scoring), self.tokenizer.eos_token_id]
        else:
            answer = [token for part in trajectory.turns[-1].segments for token in part.ids]
        return ids + answer, learned + [True] * len(answer)


def candidates_of(
    outcomes: Mapping[Key, RewardOutcome], entropies: Mapping[Key, Mapping[str, Any]], config: WeightsConfig
) -> Candidates:
    """Return the tensors that weights are computed from, in the order of `outcomes`."""
    groups: dict[str, int] = {}
    for query_id, _ in outcomes:
        groups.setdefault(query_id, len(groups))
    rows = [entropies[key] for key in outcomes]
    logprobs = [math.nan if row["log_probs"] is None else -row["log_probs"] * _tokens(row) for row in rows]
    least = math.log(config.min_probability) if config.min_probability else -math.inf
    return Candidates(
        group_ids=torch.tensor([groups[query_id] for query_id, _ in outcomes], dtype=torch.int64),
        usable=torch.tensor([logprob >= least for logprob in logprobs]),  # NaN is not
        answer_logprobs=torch.tensor(logprobs, dtype=torch.float64),
        answer_tokens=torch.tensor([_tokens(row) for row in rows], dtype=torch.int64),
        rewards=torch.tensor([outcome.parts[config.reward] for outcome in outcomes.values()], dtype=torch.float64),
        correct=torch.tensor([outcome.parts["sub_span"] > 0 for outcome in outcomes.values()]),
    )


def _tokens(row: Mapping[str, Any]) -> int:
    """A file that was not written here does not say of how many tokens its mean is; then the mean is what there is."""
    return int(row.get("tokens", 1))


def format_stage(files: EpochFiles, maker: Maker, belongs_to: Mapping[str, Any]) -> dict[str, Any]:
    """Weigh an iteration's trajectories and write the examples of its M-step; return counts and figures.

    Inference and entropy files are matched by question and trajectory.

    Raises:
        DataError: they do not match, or no trajectory has a weight.
    """
    outcomes = {key: outcome for key, _, outcome in read_trajectories(files.trajectories)}
    entropies = by_key(read_json(files.entropy), files.entropy, ("log_probs",))
    if outcomes.keys() != entropies.keys():
        odd = sorted(outcomes.keys() ^ entropies.keys())[0]
        raise DataError(
            f"{files.entropy} and {files.trajectories} do not hold the same trajectories ({len(entropies)} and "
            f"{len(outcomes)}); question {odd[0]!r}, trajectory {odd[1]} is in one only: run `entropy` again"
        )
    config = maker.weights
    candidates = candidates_of(outcomes, entropies, config)
    weights, stats = trajectory_weights(config.kind, candidates, config.length_exponent)
    by_weight = dict(zip(outcomes, weights.tolist(), strict=True))
    counts: Counter[str] = Counter(examples=0, rank=0, rows=0, light=0, accurate=0)
    counts["improbable"] = reasons(entropies)["scored"] - int(candidates.usable.sum())
    published: list[dict[str, Any]] = []
    partial = files.rows.with_name(f".{files.rows.name}.partial")
    with partial.open("w", encoding="utf-8") as rows:
        for examples in _examples(files, maker, by_weight, entropies, counts):
            published += [example.published() for example in examples]
            for example in _merged(examples) if config.merge else examples:
                if example.weight < config.min_weight:
                    counts["light"] += 1
                    continue
                counts["rows"] += 1
                rows.write(json.dumps(example.row()) + "\n")
    if not counts["rows"]:
        partial.unlink()
        raise DataError(
            f"no trajectory of {files.trajectories} has a weight ({dict(reasons(entropies))}, {counts['improbable']} "
            f"below weights.min_probability={config.min_probability}, weights.kind={config.kind}); sample more "
            "trajectories, or begin with a better policy"
        )
    partial.replace(files.rows)
    for stale in files.folder.glob(f"epo{files.epoch}.training.len=*"):
        stale.unlink()
    training = write_json(files.training(len(published)), published, dict(belongs_to))
    return {
        "training": training.name,
        **counts,
        "reasons": dict(reasons(entropies)),
        **stats,
        "log_likelihood": log_likelihood(by_weight, entropies),
    }


def _examples(
    files: EpochFiles,
    maker: Maker,
    weights: Mapping[Key, float],
    entropies: Mapping[Key, Mapping[str, Any]],
    counts: Counter[str],
) -> Iterator[list[Example]]:
    """Yield the examples of each question that have a weight, and count them."""
    stream = read_trajectories(files.trajectories)
    for _, own in groupby(stream, key=lambda item: item[0][0]):
        examples: list[Example] = []
        for key, trajectory, outcome in own:
            if weights[key] <= 0:
                continue
            gold = str(entropies[key].get("gold") or trajectory.question.answers[0])
            examples += maker.examples(key, trajectory, weights[key], gold)
            counts["accurate"] += outcome.correct
        counts["examples"] += sum(example.kind == "trajectory" for example in examples)
        counts["rank"] += sum(example.kind == "rank" for example in examples)
        yield examples


def _merged(examples: Sequence[Example]) -> list[Example]:
    """Return one example for equal ones, with the sum of their weights; the order stays."""
    kept: dict[tuple[tuple[int, ...], tuple[bool, ...]], Example] = {}
    for example in examples:
        same = kept.get((example.ids, example.learned))
        weight = example.weight + (same.weight if same else 0.0)
        kept[example.ids, example.learned] = replace(same or example, weight=weight)
    return list(kept.values())


def reasons(entropies: Mapping[Key, Mapping[str, Any]]) -> Counter[str]:
    """Count the trajectories by the reason against them; `scored` have none."""
    return Counter(
        str(row.get("reason") or ("scored" if row["log_probs"] is not None else "not_finite"))
        for row in entropies.values()
    )


def log_likelihood(weights: Mapping[Key, float], entropies: Mapping[Key, Mapping[str, Any]]) -> float | None:
    """Return the mean over questions of log mean_k p(y | x, z_k), the sampled bound on log p(y | x).

    Trajectories without a log-probability count as impossible; questions without any are left out. None without any
    question.
    """
    by_question: dict[str, list[float]] = {}
    for key in weights:
        row = entropies[key]
        value = -math.inf if row["log_probs"] is None else -row["log_probs"] * _tokens(row)
        by_question.setdefault(key[0], []).append(value)
    sums = [
        float(torch.tensor(values, dtype=torch.float64).logsumexp(dim=0)) - math.log(len(values))
        for values in by_question.values()
        if max(values) > -math.inf
    ]
    return sum(sums) / len(sums) if sums else None


def rows_path(files: EpochFiles) -> Path:
    """Return the token rows of the M-step.

    Raises:
        DataError: the stage that writes them has not run.
    """
    if not files.rows.is_file():
        raise DataError(f"{files.rows} does not exist; run the stage `format` first")
    return files.rows
