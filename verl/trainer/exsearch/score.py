"""The second half of the E-step: how probable the gold answer is after each trajectory, log p(y | x, z).

The context is what the policy read before its last turn, token by token; the answer's tokens follow it teacher-forced,
and nothing else is scored. Each trajectory that has no such number has a reason instead.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.agent.grammar.exsearch import facts_of
from verl.algorithms.balance import pack_rows
from verl.trainer.exsearch.config import ScoringConfig
from verl.trainer.exsearch.files import EpochFiles, Key, read_trajectories, write_json
from verl.types import Question, Stop, Trajectory
from verl.workers.heads import LogProbModel
from verl.workers.model import ModelConfig, load_causal_lm

logger = logging.getLogger(__name__)

Reason = Literal["", "failed", "no_answer", "empty_facts", "empty_gold", "too_long"]
_CHUNK = 4096  # trajectories whose rows are in memory at a time


@dataclass(frozen=True, slots=True)
class Scored:
    """What the E-step knows of one trajectory.

    Attributes:
        reason: why it has no log-probability, else empty.
        logprob: log p(y | x, z), summed over the answer's tokens.
        tokens: how many tokens that are.
        gold: the accepted answer that an example of it is given.
    """

    key: Key
    reason: Reason
    logprob: float = math.nan
    tokens: int = 0
    gold: str = ""


@dataclass(frozen=True, slots=True)
class Golds:
    """The accepted answers of a question, as tokens; those that tokenise to nothing are left out."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


def golds_of(question: Question, tokenizer: PreTrainedTokenizerBase, config: ScoringConfig) -> Golds:
    """Return the accepted answers that count by `config.gold`, without repetitions."""
    texts = question.answers[:1] if config.gold == "first" else tuple(dict.fromkeys(question.answers))
    pairs = [(text, answer_ids(text, tokenizer, config)) for text in texts if text.strip()]
    kept = [(text, ids) for text, ids in pairs if ids]
    return Golds(tuple(text for text, _ in kept), tuple(ids for _, ids in kept))


def answer_ids(text: str, tokenizer: PreTrainedTokenizerBase, config: ScoringConfig) -> tuple[int, ...]:
    """Return an answer's tokens in the turn that gives it, without the token that ends the turn."""
    return tuple(tokenizer.encode(f"{config.answer_prefix}{text.strip()}", add_special_tokens=False))


def context_of(trajectory: Trajectory) -> tuple[int, ...]:
    """Return the tokens that the policy read before its last turn."""
    *before, last = trajectory.turns
    if last.prompt_ids:
        return last.prompt_ids
    starts = [index for index, turn in enumerate(before) if turn.prompt_ids]
    if starts:
        raise ValueError(f"question {trajectory.question.id}: rebuilt before its last turn, which says nothing of it")
    return trajectory.prompt_ids + tuple(token for turn in before for part in turn.segments for token in part.ids)


def reason_against(trajectory: Trajectory, golds: Golds, config: ScoringConfig) -> Reason:
    """Say by which rule a trajectory has no weight; empty if it may have one.

    `no_answer`: it ended before the answer was asked for, at a limit of tokens. `empty_facts`: too many of its searches
    have no recorded evidence. `empty_gold`: no accepted answer has a token. `too_long`: with its answer it exceeds
    `max_tokens`.
    """
    if trajectory.stop is Stop.FAILED:
        return "failed"
    if trajectory.stop is not Stop.FINISHED:
        return "no_answer"
    if sum(not fact for fact in facts_of(trajectory)) > config.max_empty_facts:
        return "empty_facts"
    if not golds.ids:
        return "empty_gold"
    if len(context_of(trajectory)) + max(map(len, golds.ids)) + 1 > config.max_tokens:
        return "too_long"
    return ""


class AnswerScorer:
    """Teacher-forced log-probabilities of answers under one model, in micro-batches of rows of similar length."""

    def __init__(self, model: str, config: ScoringConfig, device: str = "auto") -> None:
        """Load the model.

        Raises:
            ConfigError: it does not load.
        """
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        settings = ModelConfig(model, dtype=config.dtype)
        loaded: LogProbModel = load_causal_lm(settings)
        self._model = loaded.to(device=place, dtype=settings.compute_dtype).eval()
        self._device = torch.device(place)
        self._budget = config.micro_tokens

    def logprobs(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Return the sum of the log-probabilities of the answer's tokens after the context's, for each pair.

        Equal pairs, which a policy that is sure of itself samples often, are computed once.
        """
        pairs = [(tuple(context), tuple(answer)) for context, answer in rows]
        distinct = list(dict.fromkeys(pairs))
        found = dict(zip(distinct, self._logprobs(distinct), strict=True))
        return [found[pair] for pair in pairs]

    @torch.inference_mode()
    def _logprobs(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
        lengths = [len(context) + len(answer) for context, answer in rows]
        sums = [math.nan] * len(rows)
        for group in pack_rows(lengths, self._budget):
            width = max(lengths[row] for row in group)
            ids = torch.zeros((len(group), width), dtype=torch.int64)
            mask = torch.zeros((len(group), width), dtype=torch.bool)
            for at, row in enumerate(group):
                context, answer = rows[row]
                ids[at, : lengths[row]] = torch.tensor([*context, *answer])
                mask[at, len(context) : lengths[row]] = True
            logprobs, _ = self._model(ids.to(self._device), mask.to(self._device))
            for row, value in zip(group, logprobs.double().sum(dim=1).tolist(), strict=True):
                sums[row] = value
        return sums


def score_all(
    trajectories: Iterable[tuple[Key, Trajectory]],
    scorer: AnswerScorer,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoringConfig,
    total: int | None = None,
) -> Iterator[Scored]:
    """Score trajectories in their order, a bounded number in memory at a time."""
    with tqdm(total=total, desc="log p(y|x,z)", unit="traj") as bar:
        stream = iter(trajectories)
        while chunk := list(islice(stream, _CHUNK)):
            yield from _score_chunk(chunk, scorer, tokenizer, config)
            bar.update(len(chunk))


def _score_chunk(
    chunk: Sequence[tuple[Key, Trajectory]],
    scorer: AnswerScorer,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoringConfig,
) -> Iterator[Scored]:
    rows: list[tuple[Sequence[int], Sequence[int]]] = []
    held: list[tuple[Key, Reason, Golds, int]] = []
    end = (tokenizer.eos_token_id,) if config.end_of_turn else ()
    for key, trajectory in chunk:
        golds = golds_of(trajectory.question, tokenizer, config)
        reason = reason_against(trajectory, golds, config)
        held.append((key, reason, golds, len(rows)))
        if not reason:
            context = context_of(trajectory)
            rows += [(context, ids + end) for ids in golds.ids]
    sums = scorer.logprobs(rows)
    for key, reason, golds, first in held:
        if reason:
            yield Scored(key, reason)
        else:
            yield _chosen(key, golds, sums[first : first + len(golds.ids)], len(end), config)


def _chosen(key: Key, golds: Golds, sums: Sequence[float], end: int, config: ScoringConfig) -> Scored:
    """Apply the rule for several accepted answers; NaN is never the best."""
    best = max(range(len(sums)), key=lambda at: -math.inf if math.isnan(sums[at]) else sums[at])
    value = sums[best]
    if config.gold == "any":
        value = float(torch.tensor(sums, dtype=torch.float64).logsumexp(dim=0))
    return Scored(key, "", value, len(golds.ids[best]) + end, golds.texts[best])


def entropy_stage(
    files: EpochFiles,
    scorer: AnswerScorer,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoringConfig,
    belongs_to: Mapping[str, Any],
) -> Counter[str]:
    """Score the trajectories of an iteration into the published entropy file; return how many have which reason.

    Its `log_probs` is the mean negative log-likelihood, null where there is a `reason` against the trajectory.
    """
    counts: Counter[str] = Counter()
    rows = []
    stream = ((key, trajectory) for key, trajectory, _ in read_trajectories(files.trajectories))
    for scored in score_all(stream, scorer, tokenizer, config):
        counts[scored.reason or "scored"] += 1
        finite = not scored.reason and math.isfinite(scored.logprob)
        rows.append(
            {
                "query_id": scored.key[0],
                "trajectory": scored.key[1],
                "log_probs": -scored.logprob / scored.tokens if finite else None,
                "sum_logprob": scored.logprob if finite else None,
                "tokens": scored.tokens,
                "gold": scored.gold,
                "reason": scored.reason or ("" if finite else "not_finite"),
            }
        )
        counts["not_finite"] += not scored.reason and not finite
    write_json(files.entropy, rows, dict(belongs_to))
    return counts
