"""DeepRetrieval's reward of one SQL statement (family D, and D' for BIRD without reasoning): execution accuracy.

The statement and the gold (`question.extra["sql"]`) run in the same database; what a turn is paid in all, with the
parameters as they are:

| the policy's answer | bird | spider | bird_no_reason |
|---|---|---|---|
| tags wrong, or no JSON object with `sql` | -2 | -2 | -2 |
| SQLite cannot parse it | 0 | 0 | 0 |
| it names what is not there, or misuses it | 0 | 0 | 0.2 |
| it runs, and returns something else than the gold | 0.4 | 0 | 0.4 |
| it returns what the gold returns | 1.1 | 1.1 | 1.1 |

and where the variants differ:

| the policy's answer | released | corrected |
|---|---|---|
| it returns nothing, and so does the gold | as right | as an error, 0 |
| it takes too long | as a statement that returned nothing, so right where the gold returns nothing | as an error, 0 |
| it writes, attaches, ... (it is never run) or there is none in the text | the same | as an error, 0 |
| it returns more than the limits allow | as something else than the gold | as an error, 0 |
| several statements, a process that died | as a misuse | as an error, 0 |
| `sql` is blank | as a statement that returned nothing | -2 |
| `sql` is there, but no text | as a misuse | -2 |
| which results are the same | `comparison: bird`: equal as sets | `comparison: multiset`: `verl.rewards.sql_compare` |

`corrected` is the default. The released code runs everything in a database that it opens for writing; here it is paid
as if it had, and never run. Two things differ from it in both variants: a gold that does not run, and a database that
is not there, have no score (`failed`), so the trajectory trains nobody.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from verl.errors import DataError, RetrieverError
from verl.rewards.evidence import Evidence, Sql, failed
from verl.rewards.sql_compare import TOLERANCE, Comparison, same
from verl.rewards.sql_text import joined_comparisons, orders, without_distinct
from verl.types import Question, RewardOutcome, SqlResult, Turn

Dataset = Literal["bird", "spider", "bird_no_reason"]
Whose = Literal["bird", "spider", "bird_no_reason", "source"]
Variant = Literal["corrected", "released"]
Form = Literal["readable", "tags", "json", "value", "blank"]
"""How an answer reads: SQL; wrong tags; no JSON object with the key; the key without a text; a blank text."""
Standing = Literal["correct", "executed", "invalid", "error"]
"""What a statement is paid as."""

KINDS = (
    "syntax",
    "invalid",
    "no_statement",
    "several_statements",
    "refused",
    "timeout",
    "too_many_rows",
    "too_large",
    "memory",
    "crash",
)
"""Errors of a statement, as `SqlResult.error`; any other is one of the databases."""

_STANDINGS: tuple[Standing, ...] = ("correct", "executed", "invalid", "error")
_EXECUTED: dict[Dataset, float] = {"bird": 0.3, "spider": 0.0, "bird_no_reason": 0.3}
_INVALID: dict[Dataset, float] = {"bird": 0.0, "spider": 0.0, "bird_no_reason": 0.1}
_RETURNS_NOTHING = ("timeout", "refused", "no_statement")
_RETURNS_TOO_MUCH = ("too_many_rows", "too_large", "memory")
_LARGE = 10_000


@dataclass(frozen=True, slots=True)
class Judged:
    """What a statement came to.

    Attributes:
        equal: it returned what the gold returned, by the comparison, two empty results included.
        empty: it ran, and returned nothing.
    """

    standing: Standing
    error: str = ""
    executed: bool = False
    equal: bool = False
    empty: bool = False


@dataclass(frozen=True, slots=True)
class ExecutionAccuracy:
    """Families D and D'. Parts, each 0 or 1: `format` (tags and JSON are right), `tags` (they are), `executed`,
    `accuracy` (paid as right), `equal` (the same result, two empty ones included: the published accuracy), `empty`
    (it returned nothing), `error_KIND` for each of `KINDS`, `format_error_ratio` and `wrong_answer_ratio`.

    Attributes:
        dataset: whose payments; `source` goes by each question's own, for both sets in one file: `bird...`,
            `bird_wor...` (without reasoning) or `spider...`.
        comparison: which results are the same; null is the variant's, see the module's text.
        ordered: let the order of rows count where the gold orders; `bird` never does.
        tolerance: of numbers, for `comparison: multiset`.
        keep_distinct: run statements with their DISTINCT, for `comparison: spider` alone; its published evaluation
            takes them out of both unless told otherwise.
        well_formed: paid for right tags and JSON besides a payment for the statement, if that is not 0.
        malformed: paid in all for anything else.
        correct: paid besides for the gold's result.
        executed: paid besides for another result; null is the data set's: 0.3, spider 0.
        invalid: paid besides for what names something that is not there; null is the data set's: 0, bird_no_reason 0.1.
        error: paid in all where nothing else is.
    """

    needs: ClassVar[tuple[str, ...]] = ("sql",)

    dataset: Whose = "source"
    variant: Variant = "corrected"
    comparison: Comparison | None = None
    ordered: bool = True
    tolerance: float = TOLERANCE
    keep_distinct: bool = True
    well_formed: float = 0.1
    malformed: float = -2.0
    correct: float = 1.0
    executed: float | None = None
    invalid: float | None = None
    error: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance={self.tolerance}; expected 0 or more")
        if not self.keep_distinct and self.comparison != "spider":
            raise ValueError(f"keep_distinct=false with comparison={self.comparison}; set comparison=spider")
        datasets = _EXECUTED if self.dataset == "source" else (self.dataset,)
        paid = [self.paid(standing, dataset) for dataset in datasets for standing in _STANDINGS]
        if not all(map(math.isfinite, (self.malformed, *paid))):
            raise ValueError(f"the payments are {paid} and malformed={self.malformed}; expected finite numbers")
        if self.variant == "corrected" and self.malformed >= min(paid):
            raise ValueError(
                f"malformed={self.malformed} is not below {min(paid)}, what the worst statement is paid; lower it, or "
                "set variant=released"
            )

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question has its gold and names its database; DataError if not."""
        for question in questions:
            if not question.extra.get("sql", "").strip():
                raise DataError(f"question {question.id!r} has no extra.sql; prepare it with data_preprocess.sql")
            if not (question.extra.get("db_id") or question.extra.get("db_path")):
                raise DataError(f"question {question.id!r} has neither extra.db_id nor extra.db_path; expected one")
            if self.dataset == "source" and dataset_of(question) is None:
                raise DataError(
                    f"question {question.id!r} is of {question.source!r}, which names neither bird nor spider; set "
                    "params.execution_accuracy.dataset"
                )

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        """Pay for the last turn; fails where it is none of SQL, or nothing can be compared."""
        turns = evidence.trajectory.turns
        if not turns:
            return failed("the policy had no turn; its prompt may be too long")
        form = form_of(turns[-1])
        if form == "readable" and turns[-1].answer is None:
            return failed("the last turn gave no answer; this reward is for search.task=sql")
        try:
            judged = await self._judged(evidence.sql, evidence.question, form, turns[-1].answer or "")
        except RetrieverError as error:
            return failed(str(error))
        return judged if isinstance(judged, RewardOutcome) else self._outcome(form, judged, evidence.question)

    def paid(self, standing: Standing, dataset: Dataset) -> float:
        """Return what a well-formed answer is paid in all."""
        executed = _EXECUTED[dataset] if self.executed is None else self.executed
        invalid = _INVALID[dataset] if self.invalid is None else self.invalid
        tier = {"correct": self.correct, "executed": executed, "invalid": invalid, "error": 0.0}[standing]
        return self.well_formed + tier if tier else self.error

    async def _judged(self, run: Sql, question: Question, form: Form, sql: str) -> Judged | RewardOutcome | None:
        """Judge the answer; None where it has to count as malformed."""
        if form == "value" and self.variant == "released":
            return Judged("invalid")
        if form != "readable" and not (form == "blank" and self.variant == "released"):
            return None
        gold_sql = self._read(question.extra["sql"])
        gold = await run(question, gold_sql, keep=True)
        if self.variant == "released":
            gold = _as_released(gold)
        if gold.error:
            return failed(f"the gold of question {question.id!r} cannot be compared with: {gold.error}, {gold.message}")
        result = SqlResult(error="no_statement") if form == "blank" else await run(question, self._read(sql))
        if result.error and result.error not in KINDS:
            return failed(f"the database of question {question.id!r}: {result.error}, {result.message}")
        return await self._compared(result, gold, gold_sql)

    async def _compared(self, result: SqlResult, gold: SqlResult, gold_sql: str) -> Judged:
        """Compare what a statement came to with what the gold returned."""
        released, error = self.variant == "released", result.error
        result = _as_released(result) if released else result
        if result.error:
            return Judged(self._standing_of(result.error), error)
        comparison = self.comparison or ("bird" if released else "multiset")
        ordered = self.ordered and ("order by" in gold_sql.lower() if comparison == "spider" else orders(gold_sql))
        work = (gold.rows, result.rows, comparison, ordered, self.tolerance)
        large = len(gold.rows) + len(result.rows) > _LARGE  # would keep other trajectories waiting
        equal = await asyncio.to_thread(same, *work) if large else same(*work)
        standing: Standing = "correct" if equal else "executed"
        if equal and not result.rows and not released:
            standing = "error"
        return Judged(standing, error, executed=not error, equal=equal, empty=not result.rows and not error)

    def _standing_of(self, error: str) -> Standing:
        if error == "invalid":
            return "invalid"
        if self.variant == "corrected" or error == "syntax":
            return "error"
        return "executed" if error in _RETURNS_TOO_MUCH else "invalid"

    def _read(self, sql: str) -> str:
        """Return a statement as the comparison runs it."""
        if self.comparison != "spider":
            return sql
        sql = joined_comparisons(sql)
        return sql if self.keep_distinct else without_distinct(sql)

    def _outcome(self, form: Form, judged: Judged | None, question: Question) -> RewardOutcome:
        dataset = dataset_of(question) if self.dataset == "source" else self.dataset
        if dataset is None:
            return failed(f"the source {question.source!r} names neither bird nor spider; set the reward's dataset")
        score = self.malformed if judged is None else self.paid(judged.standing, dataset)
        judged = judged or Judged("error")
        readable, right = form == "readable", judged.standing == "correct"
        parts = {
            "format": float(readable),
            "tags": float(form != "tags"),
            "executed": float(judged.executed),
            "accuracy": float(right),
            "equal": float(judged.equal),
            "empty": float(judged.empty),
            **{f"error_{kind}": float(readable and judged.error == kind) for kind in KINDS},
            "format_error_ratio": float(not readable),
            "wrong_answer_ratio": float(readable and not right),
        }
        return RewardOutcome(score, parts)


def form_of(turn: Turn) -> Form:
    """Say how a turn's answer reads, from the kind of fault that its grammar found."""
    if not turn.invalid:
        return "readable"
    if not turn.fault or turn.fault.startswith("tag_"):
        return "tags"
    return {"not_text": "value", "blank": "blank"}.get(turn.fault, "json")  # type: ignore[return-value]


def dataset_of(question: Question) -> Dataset | None:
    """Return whose payments a question has by the name of its source; None where the name does not say it."""
    if question.source.startswith("bird"):
        return "bird_no_reason" if "_wor" in question.source else "bird"
    return "spider" if question.source.startswith("spider") else None


def _as_released(result: SqlResult) -> SqlResult:
    """Return what the released code would have: nothing from what takes too long or returns no rows."""
    return replace(result, error="", message="", rows=()) if result.error in _RETURNS_NOTHING else result
