"""Train, validation and test questions that have nothing in common, checked.

The test questions all stay. What validation shares with them goes, and what train shares with either. Two questions
share something if they are worded alike, or if the caller says that they come from one place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from verl.errors import DataError
from verl.rewards.text import normalise
from verl.types import Question

Keys = Callable[[Question], Iterable[str]]
"""What a question must not share with one of another split."""

SPLITS = ("train", "validation", "test")
_DRAWN_SHARE = 10


@dataclass(frozen=True, slots=True)
class Separated:
    """Questions by split, and how many were left out of each and why."""

    splits: Mapping[str, tuple[Question, ...]]
    dropped: Mapping[str, int] = field(default_factory=dict)


def wording(question: Question) -> tuple[str, ...]:
    """Return the key of questions that differ in case, punctuation, articles and white space at most."""
    return (f"text:{normalise(question.text) or question.text}",)


def separate(splits: Mapping[str, Sequence[Question]], validation: int, seed: int, keys: Keys = wording) -> Separated:
    """Make splits disjoint.

    Args:
        splits: by names of `SPLITS`; without validation questions of their own, some are drawn from train.
        validation: most validation questions; a tenth of train at most is drawn.
        seed: of the draw, and of train's order.

    Raises:
        DataError: a split other than validation is empty, or nothing is left of one.
    """
    for name in ("train", "test"):
        if not splits.get(name):
            raise DataError(f"there are no {name} questions; expected some")
    test = tuple(splits["test"])
    taken = _keys_of(test, keys)
    train = [question for question in splits["train"] if taken.isdisjoint(keys(question))]
    dropped = {"train questions that test has": len(splits["train"]) - len(train)}
    draw = random.Random(seed)
    if given := splits.get("validation"):
        pool = [question for question in given if taken.isdisjoint(keys(question))]
        dropped["validation questions that test has"] = len(given) - len(pool)
        count = min(validation, len(pool))
        dropped["validation questions above the number wanted"] = len(pool) - count
    else:
        pool, count = train, min(validation, len(train) // _DRAWN_SHARE)
    chosen = [pool[at] for at in sorted(draw.sample(range(len(pool)), count))]
    taken = _keys_of(chosen, keys)
    kept = [question for question in train if taken.isdisjoint(keys(question))]
    dropped["train questions that validation has, or was drawn from"] = len(train) - len(kept)
    draw.shuffle(kept)
    separated = {"train": tuple(kept), "validation": tuple(chosen), "test": test}
    check_disjoint(separated, keys)
    return Separated(separated, {why: number for why, number in dropped.items() if number})


def check_disjoint(splits: Mapping[str, Sequence[Question]], keys: Keys = wording) -> None:
    """Check that no split is empty and none shares anything with another.

    Raises:
        DataError: names two questions that do.
    """
    owners: dict[str, tuple[str, str]] = {}
    for name, questions in splits.items():
        if not questions:
            raise DataError(f"nothing is left of {name}; the source has too few questions, or test has them all")
        for question in questions:
            for key in keys(question):
                other, id = owners.setdefault(key, (name, question.id))
                if other != name:
                    raise DataError(f"{other} question {id!r} and {name} question {question.id!r} share {key[:80]!r}")


def _keys_of(questions: Iterable[Question], keys: Keys) -> set[str]:
    return {key for question in questions for key in keys(question)}
