"""Rewards by name, weighted sums of them, and the scorer that turns a trajectory into a `RewardOutcome`.

| name | score | parameters (`params.NAME`) | needs |
|---|---|---|---|
| `gain` | GBR: accuracy - baseline's (`gain: paper`), or 2 accuracy - baseline's (`released`) | | baseline |
| `generation_accuracy` | 1 if the answer is accurate: span match, else the judge | | |
| `em` | 1 if the answer equals a gold | | |
| `f1` | F1 of the answer's words with the best gold | | |
| `sub_span` | 1 if a gold is a substring of the answer | | |
| `recall_of_gold` | share of the gold titles among the documents | | gold titles |
| `answer_in_context` | 1 if a gold stands in the documents | | |
| `perplexity_gain` | log p(gold) per token with the documents, minus that with the baseline's | `golds`, `against` | \
baseline with documents; likelihood |
| `semantic_perplexity` | SePer: belief in the gold's meaning with the documents, minus that without | `variant`, \
`samples`, `threshold`, `against` | sampler, entailment |
| `valid_format` | 1 if the trajectory finished by itself without an invalid turn | | |
| `invalid_turns` | -1 for each turn without an action | | |
| `search_cost` | -cost for each answered search after the first free ones | `cost`, `free` | |
| `retrieval_recall` | tier of the recall of target ids by one query (DeepRetrieval, family A) | `variant`, `grading`, \
`topk`, `tiers`, `well_formed`, `malformed`, `miss`, `unreadable` | answers are ids |
| `first_hit_rank` | tier of the rank of the first document with an answer (family B) | the same without `grading` | |
| `ndcg` | 0.1 + NDCG of one query (family C) | `variant`, `k`, `eval_k`, `train_k`, `well_formed`, `malformed`, \
`miss` | answers are ids |
| `execution_accuracy` | 0.1 + tier of what one SQL statement returns (family D) | `dataset`, `variant`, `comparison`, \
`ordered`, `tolerance`, `keep_distinct`, `well_formed`, `malformed`, `correct`, `executed`, `invalid`, `error` | \
`extra.sql`, `extra.db_id`; sql |

The generator is asked for its answer only by rewards that read it (`gain` to `sub_span`). A weight of 0 measures a
reward, which then shows among the parts, without paying it.

To add a reward: write `async def my_reward(evidence: Evidence) -> RewardOutcome` and either enter it in `REWARDS` or
name it in the configuration by its dotted path, `terms: {my_package.my_module.my_reward: 1.0}`. One with parameters is
a frozen dataclass with such a `__call__`; its fields are what `params` may set. Two things are optional: a class
attribute `needs` with the names of the `Tools` that it asks, and `validate(questions)`, which raises DataError if the
data set lacks what it reads.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol

from verl.errors import ConfigError, DataError, GeneratorError
from verl.rewards.accuracy import em, generation_accuracy, sub_span, token_f1
from verl.rewards.entailment import EntailmentConfig, create_entailment
from verl.rewards.evidence import Answer, Evidence, Judge, Judging, Tools, failed, missing_tool
from verl.rewards.form import SearchCost, invalid_turns, valid_format
from verl.rewards.gain import Gain, GainVariant
from verl.rewards.ndcg import Ndcg
from verl.rewards.perplexity import PerplexityGain
from verl.rewards.rank import FirstHitRank, RetrievalRecall
from verl.rewards.recall import RecallOfGold, context_holds_answer
from verl.rewards.seper import SemanticPerplexity
from verl.rewards.sql import ExecutionAccuracy
from verl.rewards.sql_config import SqlConfig
from verl.typed import Decoder, nearest
from verl.types import Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger(__name__)

_DECODER = Decoder(error=ConfigError)


class Reward(Protocol):
    """A small function or object; what else it may have stands in the module's docstring."""

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        """Return the score with its named parts; `failed` where there is nothing to judge.

        Raises:
            GeneratorError: the generator or the judge could not answer; the scorer turns it into a failed outcome.
        """
        ...


REWARDS: dict[str, Reward | type[Reward]] = {
    "gain": Gain,
    "generation_accuracy": generation_accuracy,
    "em": em,
    "f1": token_f1,
    "sub_span": sub_span,
    "recall_of_gold": RecallOfGold,
    "answer_in_context": context_holds_answer,
    "perplexity_gain": PerplexityGain,
    "semantic_perplexity": SemanticPerplexity,
    "valid_format": valid_format,
    "invalid_turns": invalid_turns,
    "search_cost": SearchCost,
    "retrieval_recall": RetrievalRecall,
    "first_hit_rank": FirstHitRank,
    "ndcg": Ndcg,
    "execution_accuracy": ExecutionAccuracy,
}


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """What is rewarded.

    Attributes:
        terms: weight of each reward, by its name in `REWARDS` or its dotted path; the score is the weighted sum.
        gain: which variant of GBR the term `gain` is.
        equal_documents: cut the searcher's documents to the first so many, the number that the baseline saw; None
            gives the generator all of them.
        params: parameters of rewards, by the names in `terms`.
        judge: when the judge is asked, if there is one: where it is needed, or always, which reports how often it
            agrees with the span match and changes no score.
        entailment: how entailment is told, for the rewards that ask about it.
        sql: databases and limits, for the rewards that run SQL.
    """

    terms: Mapping[str, float] = field(default_factory=lambda: {"gain": 1.0})
    gain: GainVariant = "released"
    equal_documents: int | None = None
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judge: Judging = "when_needed"
    entailment: EntailmentConfig | None = None
    sql: SqlConfig | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"terms is empty; expected at least one of {', '.join(REWARDS)}")
        for name, weight in self.terms.items():
            if not math.isfinite(weight):
                raise ValueError(f"terms.{name}={weight}; expected a finite weight")
        for name in self.params:
            if name not in self.terms:
                near = nearest(name, list(self.terms))
                raise ValueError(f"params.{name} belongs to no term; did you mean {near!r}? Add it to terms or drop it")
        if self.equal_documents is not None and self.equal_documents < 1:
            raise ValueError(f"equal_documents={self.equal_documents}; expected at least 1, or null for all")


def resolve(name: str, config: RewardConfig) -> Reward:
    """Return the reward called `name`, a key of `REWARDS` or the dotted path of an async function or of a class.

    Raises:
        ConfigError: there is no such reward, or its parameters are wrong.
    """
    if name not in REWARDS and "." not in name:
        raise ConfigError(
            f"unknown reward {name!r}; did you mean {nearest(name, list(REWARDS))!r}? Rewards: {', '.join(REWARDS)}, "
            "or the dotted path of your own"
        )
    found = REWARDS[name] if name in REWARDS else _imported(name)
    params = dict(config.params.get(name, {}))
    if name == "gain":
        if params:
            raise ConfigError(f"params.gain={params}: the variant of gain is set by the key gain; drop params.gain")
        params = {"variant": config.gain}
    reward = _instance(name, found, params)
    if not callable(reward):
        raise ConfigError(f"reward {name!r} is a {type(found).__name__}; expected an async function of an Evidence")
    return reward


def _instance(name: str, found: Any, params: Mapping[str, Any]) -> Any:
    """Build a reward that is a class from its parameters; a function takes none."""
    if isinstance(found, type) and is_dataclass(found):
        return _DECODER.decode(found, params, f"params.{name}")
    if params:
        raise ConfigError(
            f"params.{name} sets {', '.join(params)}, but {name!r} takes no parameters; drop them, or make the reward "
            "a frozen dataclass, whose fields are its parameters"
        )
    return found() if isinstance(found, type) else found


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The weighted sum of several rewards; it fails as soon as one of them does."""

    terms: tuple[tuple[str, float, Reward], ...]

    def validate(self, questions: Sequence[Question]) -> None:
        """Let every term check the questions it will be asked about.

        Raises:
            DataError: a term misses a column.
        """
        for _, _, reward in self.terms:
            check = getattr(reward, "validate", None)
            if check is not None:
                check(questions)

    def check_tools(self, tools: Tools) -> None:
        """Check that every term finds what it asks.

        Raises:
            ConfigError: a tool is missing; says how to get it.
        """
        for name, _, reward in self.terms:
            for tool in getattr(reward, "needs", ()):
                if getattr(tools, tool, None) is None:
                    raise missing_tool(tool, f"reward {name!r}")

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        score, parts = 0.0, {}
        for name, weight, reward in self.terms:
            outcome = await reward(evidence)
            if outcome.failed:
                return outcome
            if not math.isfinite(outcome.score):
                return failed(f"reward {name!r} returned the score {outcome.score}; expected a finite number")
            score += weight * outcome.score
            parts |= dict(outcome.parts) or {name: outcome.score}
        return RewardOutcome(score, parts)


def combine(config: RewardConfig) -> WeightedSum:
    """Build the weighted sum that `config.terms` describes.

    Raises:
        ConfigError: unknown reward.
    """
    return WeightedSum(tuple((name, weight, resolve(name, config)) for name, weight in config.terms.items()))


class Scorer:
    """Scores one trajectory; call it the moment a trajectory ends, as many at once as there are.

    Args:
        config: what is rewarded.
        answer: the frozen generator.
        judge: asked where the span match says no; None leaves it at the span match.
        tools: what some rewards ask besides; entailment comes from `config` if it is not among them.

    Raises:
        ConfigError: an unknown reward, wrong parameters, or a reward whose tool is missing.
    """

    def __init__(
        self, config: RewardConfig, answer: Answer, judge: Judge | None = None, tools: Tools | None = None
    ) -> None:
        self.config = config
        self._reward = combine(config)
        self._answer = answer
        self._judge = judge
        self._tools = tools or Tools()
        if self._tools.entailment is None and config.entailment is not None:
            self._tools = replace(self._tools, entailment=create_entailment(config.entailment))
        self._reward.check_tools(self._tools)
        if judge is None and config.judge == "always":
            raise ConfigError("judge=always, but no judge is configured; configure one, or set judge=when_needed")

    def validate(self, questions: Sequence[Question]) -> None:
        """Check, before any process starts, that the data set has what the rewards need.

        Raises:
            DataError: a missing column, or baselines of another number of documents than `equal_documents`.
        """
        self._reward.validate(questions)
        wanted = self.config.equal_documents
        for question in questions:
            # Published caches hold no documents with their baselines; there is nothing to compare then.
            documents = question.baseline.documents if question.baseline else ()
            if wanted is not None and documents and len(documents) != wanted:
                raise DataError(
                    f"the baseline of question {question.id!r} saw {len(documents)} documents but equal_documents is "
                    f"{wanted}; set equal_documents={len(documents)} or precompute the baseline again"
                )

    async def __call__(self, trajectory: Trajectory) -> RewardOutcome:
        """Return the outcome; a failure of the trajectory, the generator or the judge is an outcome, never a score."""
        if trajectory.stop is Stop.FAILED:
            return failed(f"trajectory failed: {trajectory.error or 'no cause given'}")
        documents = trajectory.documents[: self.config.equal_documents]
        evidence = Evidence(trajectory, documents, self._answer, self._judge, self.config.judge, self._tools)
        try:
            outcome = await self._reward(evidence)
            if outcome.failed:
                return outcome
            return await self._completed(outcome, evidence)
        except GeneratorError as error:
            logger.warning("no score for question %r: %s", trajectory.question.id, error)
            return failed(str(error) or repr(error))

    async def _completed(self, outcome: RewardOutcome, evidence: Evidence) -> RewardOutcome:
        """Add what every scored trajectory reports: its documents and, if it was asked, the generator's answer."""
        parts = {**outcome.parts, "documents": float(len(evidence.documents))}
        if not evidence.asked:
            return replace(outcome, parts=parts)
        verdict = await evidence.verdict()
        parts.setdefault("accuracy", float(verdict.correct))
        parts["documents_dropped"] = float(len(evidence.documents) - verdict.documents_used)
        parts |= verdict.judge_parts(self.config.judge)
        return replace(outcome, parts=parts, answer=verdict.answer, correct=verdict.correct)


def _imported(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ConfigError(
            f"reward {path!r} cannot be imported: {cause}; expected package.module.name, importable from here"
        ) from cause
