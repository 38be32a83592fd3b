"""Which questions a report is about: the same ones for every method, or the report compares nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.errors import DataError
from verl.evaluation.collect import Context
from verl.types import Question

logger = logging.getLogger(__name__)

Contexts = Sequence[Context]


@dataclass(frozen=True, slots=True)
class Footing:
    """What is compared.

    Attributes:
        contexts: of each method, for the same questions in the same order.
        asked: how many questions there are in all.
        missing: how many of them each method has no context for, methods without a gap left out.
    """

    contexts: Mapping[str, list[Context]]
    asked: int
    missing: Mapping[str, int]


def on_one_footing(
    folders: Mapping[str, Path],
    found: Mapping[str, Contexts],
    asked: Sequence[Question] | None = None,
    partial: bool = False,
) -> Footing:
    """Take of every method the contexts of the questions that are to be compared.

    Args:
        folders: where `found` was read from, by method.
        asked: the questions that every method was to be asked; all that any of them was asked if None.
        partial: compare on the questions that all methods have, in place of refusing folders with gaps.

    Raises:
        DataError: contexts of another question set, a folder with gaps, or no question that all methods have.
    """
    wanted = _wanted(folders, found, asked)
    have = {name: {context.trajectory.question.id: context for context in contexts} for name, contexts in found.items()}
    gaps = {name: [id for id in wanted if id not in own] for name, own in have.items()}
    missing = {name: len(ids) for name, ids in gaps.items() if ids}
    if missing and not partial:
        name = next(iter(missing))
        raise DataError(_unfinished(name, folders[name], gaps[name], len(wanted)))
    common = [id for id in wanted if all(id in own for own in have.values())]
    if not common:
        raise DataError(
            f"no question is in all of {', '.join(map(str, folders.values()))}; collect every method for the same "
            "questions"
        )
    if missing:
        logger.warning("partial: %d of %d questions, those that every method has", len(common), len(wanted))
    kept = frozenset(common)
    # A question that stands twice in a folder stays so: scoring refuses it with its own message.
    chosen = {
        name: sorted(
            (context for context in contexts if context.trajectory.question.id in kept),
            key=lambda context: wanted[context.trajectory.question.id],
        )
        for name, contexts in found.items()
    }
    return Footing(chosen, len(wanted), missing)


def _wanted(
    folders: Mapping[str, Path], found: Mapping[str, Contexts], asked: Sequence[Question] | None
) -> dict[str, int]:
    """Return the position of every question by its id; refuse ids that stand for different questions."""
    texts = {question.id: question.text for question in asked or ()}
    whose = dict.fromkeys(texts, "the questions that are asked")
    for name, contexts in found.items():
        for context in contexts:
            question = context.trajectory.question
            if asked is not None and question.id not in texts:
                raise DataError(
                    f"contexts.{name}={folders[name]} holds {question.id!r}, which is not among the questions that are "
                    "asked; it was collected for another question set, collect it for this one"
                )
            if texts.setdefault(question.id, question.text) != question.text:
                raise DataError(
                    f"{question.id!r} is {question.text!r} in contexts.{name}={folders[name]} and "
                    f"{texts[question.id]!r} in {whose[question.id]}; collect all methods for the same questions"
                )
            whose.setdefault(question.id, str(folders[name]))
    return {id: place for place, id in enumerate(texts)}


def _unfinished(name: str, folder: Path, missing: Sequence[str], wanted: int) -> str:
    return (
        f"contexts.{name}={folder} is unfinished: {len(missing)} of {wanted} questions are missing, the first is "
        f"{missing[0]!r}{_listed(folder)}; run the same `s3 collect` again, what is finished is kept, or pass "
        "partial=true to compare on the questions that every method has"
    )


def _listed(folder: Path) -> str:
    """Say what `s3 collect` noted about failures, if it noted any."""
    path = folder / "errors.jsonl"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        cause = json.loads(lines[0])["cause"]
    except (IndexError, ValueError, KeyError, TypeError):
        return f" (see {path})"
    return f" ({path} lists {len(lines)}, the first because of {cause})"
