"""Which questions of several sources stay: one of each wording, none that a held-out set asks, a seeded sample.

The questions lie in parquets that are streamed; what is held in memory is a digest and a few words of each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_preprocess.readers.mirage import retrieval_query
from verl.errors import DataError
from verl.records import iter_questions
from verl.rewards.text import normalise
from verl.types import Question

Paths = Mapping[str, Path]
"""The parquets of one split by the source's key, in the order in which they are named."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How questions are selected; the fields are those of `data_preprocess.qa.QaConfig`.

    Attributes:
        sample: at most so many questions of each set, by split; None for all.
    """

    dedupe: bool
    dedupe_across: bool
    decontaminate: bool
    seed: int
    sample: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of the rows of one set in one split; a line of the summary.

    Attributes:
        read: rows, those skipped included.
        malformed: rows that were skipped.
        duplicates: worded like an earlier question.
        contaminated: training questions that a held-out source asks too.
        unsampled: left out by the sample.
        gold_titles: questions written that name their gold passages.
        kinds: questions written by kind, those without one left out.
    """

    source: str
    split: str
    read: int
    malformed: int = 0
    duplicates: int = 0
    contaminated: int = 0
    unsampled: int = 0
    written: int = 0
    gold_titles: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A question that may be sampled: where it lies, and what the summary says of it."""

    key: str
    position: int
    kind: str
    has_titles: bool


class Chosen:
    """The questions of one split that stay.

    Attributes:
        found: questions by set, before anything was dropped.
        duplicates, contaminated: how many were dropped, by set.
        candidates: the others, by set.
        sampled: those of them that stay.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.found: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.contaminated: Counter[str] = Counter()
        self.candidates: dict[str, list[_Candidate]] = {}
        self.sampled: dict[str, list[_Candidate]] = {}

    def questions(self, paths: Paths) -> Iterator[Question]:
        """Yield the questions that stay, in the order of the sources and of their rows."""
        positions: dict[str, set[int]] = {key: set() for key in paths}
        for candidate in (candidate for sampled in self.sampled.values() for candidate in sampled):
            positions[candidate.key].add(candidate.position)
        for key, path in paths.items():
            wanted = positions[key]
            yield from (question for number, question in enumerate(iter_questions(path)) if number in wanted)

    def tally(self, malformed: Mapping[str, int]) -> list[Kept]:
        """Return the summary's lines.

        Args:
            malformed: rows that were skipped, by set.
        """
        return [self._line(source, malformed.get(source, 0)) for source in dict.fromkeys([*self.found, *malformed])]

    def _line(self, source: str, malformed: int) -> Kept:
        sampled = self.sampled.get(source, [])
        return Kept(
            source,
            self.split,
            self.found[source] + malformed,
            malformed,
            self.duplicates[source],
            self.contaminated[source],
            len(self.candidates.get(source, [])) - len(sampled),
            len(sampled),
            sum(candidate.has_titles for candidate in sampled),
            dict(sorted(Counter(candidate.kind for candidate in sampled if candidate.kind).items())),
        )


def select_questions(splits: Mapping[str, Paths], selection: Selection) -> dict[str, Chosen]:
    """Select the questions of every split.

    Raises:
        DataError: an id occurs in two files.
    """
    held_out: set[bytes] = set()
    if selection.decontaminate and "train" in splits:
        paths = (path for split, of_split in splits.items() if split != "train" for path in of_split.values())
        held_out = {key for path in paths for question in iter_questions(path) for key in _asked(question)}
    ids: dict[bytes, Path] = {}
    chosen = {}
    for split, of_split in splits.items():
        chosen[split] = _select(split, of_split, selection, held_out if split == "train" else frozenset(), ids)
    return chosen


def wording(question: Question) -> bytes:
    """Return a digest that questions have in common when they differ in case, punctuation, articles and spaces only."""
    return _digest(normalise(question.text) or question.text.strip().lower())


def sample_positions(total: int, size: int | None, seed: int) -> list[int]:
    """Return which of `total` rows a sample keeps, ascending: those of pandas' `sample(size, random_state=seed)`."""
    if size is None or size >= total:
        return list(range(total))
    return sorted(np.random.RandomState(seed).choice(total, size=size, replace=False).tolist())


def summary_table(rows: Collection[Kept]) -> str:
    """Lay out what became of the questions as a markdown table."""
    names = ("source", "split", "read", "malformed", "duplicates", "contaminated", "not sampled", "written")
    lines = [
        "| " + " | ".join([*names, "with gold titles", "kinds"]) + " |",
        "|---|---|" + "---:|" * (len(names) - 1) + "---|",
    ]
    for row in rows:
        kinds = ", ".join(f"{kind} {count}" for kind, count in row.kinds.items()) or "–"
        counts = (row.read, row.malformed, row.duplicates, row.contaminated, row.unsampled, row.written)
        cells = [row.source, row.split, *(f"{count:,}" for count in (*counts, row.gold_titles)), kinds]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _select(split: str, paths: Paths, selection: Selection, held_out: Set[bytes], ids: dict[bytes, Path]) -> Chosen:
    chosen = Chosen(split)
    seen: dict[str, set[bytes]] = {}
    for key, path in paths.items():
        for position, question in enumerate(iter_questions(path)):
            _check_id(question, path, ids)
            chosen.found[question.source] += 1
            asked = wording(question)
            before = seen.setdefault("" if selection.dedupe_across else question.source, set())
            repeated = asked in before
            before.add(asked)
            if not held_out.isdisjoint(_asked(question)):
                chosen.contaminated[question.source] += 1
            elif repeated and selection.dedupe:
                chosen.duplicates[question.source] += 1
            else:
                candidate = _Candidate(key, position, question.kind, bool(question.gold_titles))
                chosen.candidates.setdefault(question.source, []).append(candidate)
    for source, candidates in chosen.candidates.items():
        positions = sample_positions(len(candidates), selection.sample[split], selection.seed)
        chosen.sampled[source] = [candidates[position] for position in positions]
    return chosen


def _asked(question: Question) -> set[bytes]:
    """Return the wordings by which a question is known again elsewhere: with its options and without them."""
    return {wording(question), wording(replace(question, text=retrieval_query(question)))}


def _check_id(question: Question, path: Path, ids: dict[bytes, Path]) -> None:
    first = ids.setdefault(_digest(question.id), path)
    if first != path:
        raise DataError(
            f"id {question.id!r} is in {first} and in {path}; ids must be unique: give one of the two sources another "
            "`source` or split"
        )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
