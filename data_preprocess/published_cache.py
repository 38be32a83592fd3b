"""The published naive-RAG cache, `{source: {question: {answer, score, em_score}}}`: read, written, made into baselines.

    python -m data_preprocess.published_cache questions=IN.parquet cache=rag_cache.json output=OUT.parquet split=train

takes a downloaded parquet (for example of `pat-jj/s3_processed_data`) and a published `rag_cache.json` as they are and
writes the training parquet without asking any service. The cache knows questions by their text and no documents, so
these baselines have none.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_preprocess.train_filter import TrainFilter, select
from verl.config import run_entry
from verl.errors import DataError
from verl.records import read_questions, write_questions
from verl.types import Baseline, Question

logger = logging.getLogger(__name__)

Cache = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What naive RAG answered to one question, and whether that was accurate and exact."""

    answer: str
    correct: bool
    exact: bool


@dataclass(frozen=True)
class ImportConfig:
    """What to import.

    Attributes:
        questions: parquet in the published columns.
        cache: the published `rag_cache.json`.
        output: parquet to write.
        split: goes to `extra_info.split`; the filter is applied to `train` only.
        missing: what happens to a question that the cache does not know: an error, leave it out, or keep it without a
            baseline (as published; a reward that needs the baseline then refuses the data set).
        limit: take the first so many questions only.
    """

    questions: Path
    cache: Path
    output: Path
    split: str
    missing: Literal["error", "drop", "keep"] = "error"
    limit: int | None = None
    filter: TrainFilter = field(default_factory=TrainFilter)

    def __post_init__(self) -> None:
        if self.output.resolve() == self.questions.resolve():
            raise ValueError(f"output={self.output} is the file that questions names; write to another one")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or null for all questions")


def read_cache(path: Path) -> Cache:
    """Read a published cache; its entries are checked when they are used.

    Raises:
        DataError: the file is missing, no JSON, or of another shape.
    """
    try:
        cache = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise DataError(f"{path}: no such file; expected a rag_cache.json") from cause
    except (ValueError, OSError) as cause:
        raise DataError(f"{path}: {cause}; expected a rag_cache.json, move the file away") from cause
    if not isinstance(cache, dict) or not all(isinstance(entries, dict) for entries in cache.values()):
        raise DataError(f"{path}: expected {{source: {{question: {{answer, score, em_score}}}}}}; move the file away")
    return cache


def entry_of(question: Question, cache: Cache) -> CacheEntry | None:
    """Return what the cache says of a question, None if it does not know it.

    Raises:
        DataError: the entry is malformed.
    """
    stored = cache.get(question.source, {}).get(question.text)
    if stored is None:
        return None
    answer, score = (stored.get("answer"), stored.get("score")) if isinstance(stored, Mapping) else (None, None)
    exact = stored.get("em_score", 0) if isinstance(stored, Mapping) else 0
    if not isinstance(answer, str) or score not in (0, 1) or exact not in (0, 1):
        raise DataError(
            f"the cache's entry of question {question.id!r} ({question.source!r}) is {str(stored)[:120]}; expected an "
            "answer and a score and em_score of 0 or 1"
        )
    return CacheEntry(answer, bool(score), bool(exact))


def with_baselines(questions: Iterable[Question], cache: Cache) -> tuple[list[Question], list[Question]]:
    """Return all questions, in order, with the baselines that the cache knows, and those that it does not know.

    Raises:
        DataError: an entry is malformed.
    """
    known: list[Question] = []
    missing: list[Question] = []
    for question in questions:
        entry = entry_of(question, cache)
        if entry is None:
            missing.append(question)
            known.append(question)
        else:
            known.append(replace(question, baseline=Baseline((), entry.answer, entry.correct)))
    return known, missing


def merged(existing: Cache, entries: Iterable[tuple[Question, CacheEntry]]) -> dict[str, dict[str, Any]]:
    """Return the cache with further entries."""
    cache: dict[str, dict[str, Any]] = {source: dict(known) for source, known in existing.items()}
    for question, entry in entries:
        written = {"answer": entry.answer, "score": int(entry.correct), "em_score": int(entry.exact)}
        cache.setdefault(question.source, {})[question.text] = written
    return cache


def run(config: ImportConfig) -> dict[str, int]:
    """Import as configured.

    Returns:
        How many questions were read, written, and left out for which reason.

    Raises:
        DataError: unreadable files, a question that the cache does not know with `missing=error`, or none left.
    """
    questions, missing = with_baselines(read_questions(config.questions, config.limit), read_cache(config.cache))
    if missing and config.missing == "error":
        sources = ", ".join(f"{source} {count}" for source, count in Counter(q.source for q in missing).items())
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no entry in {config.cache} (by source: {sources}), "
            f"first {missing[0].id!r}; pass the cache that belongs to them, or set missing=drop, or missing=keep"
        )
    dropped: dict[str, int] = {}
    if missing and config.missing == "drop":
        unknown = {question.id for question in missing}
        questions = [question for question in questions if question.id not in unknown]
        dropped["not in the cache"] = len(missing)
    keep = config.filter if config.split == "train" else TrainFilter.none()
    kept, filtered = select(questions, keep)
    dropped |= filtered
    if not kept:
        raise DataError(f"none of the questions of {config.questions} is left ({dropped}); switch a filter off")
    write_questions(config.output, kept, config.split)
    told = ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none"
    logger.info("%s: kept %d questions, dropped %s", config.output, len(kept), told)
    return {"read": len(questions) + dropped.get("not in the cache", 0), "written": len(kept), **dropped}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("import_cache", ImportConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: ImportConfig) -> None:
    run(config)


if __name__ == "__main__":
    sys.exit(main())
