"""One source of questions: where it lies, and its entries one after the other as questions of this project."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from data_preprocess.readers import hub
from data_preprocess.readers.base import Entry, Format, Row
from data_preprocess.readers.files import Located, read_file
from data_preprocess.readers.registry import AUTO, FORMATS, recognise
from verl.errors import ConfigError, DataError
from verl.retrieval.corpus_formats import text_lines
from verl.typed import nearest
from verl.types import Document, Question

Split = Literal["train", "validation", "test"]

_FLASHRAG = "hf:RUC-NLPIR/FlashRAG_datasets"
KNOWN: dict[str, dict[str, str]] = {
    "nq": {"train": "train", "validation": "dev", "test": "test"},
    "triviaqa": {"train": "train", "validation": "dev", "test": "test"},
    "popqa": {"test": "test"},
    "hotpotqa": {"train": "train", "test": "dev"},
    "2wikimultihopqa": {"train": "train", "test": "dev"},
    "musique": {"train": "train", "test": "dev"},
    "bamboogle": {"test": "test"},
}
"""The sets that need no path, and which of FlashRAG's splits stands for which of ours: sets whose test answers are not
public are tested on their development split, as published."""

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_LOOKED_AT = 100


@dataclass(frozen=True)
class SourceConfig:
    """One source.

    Attributes:
        path: a file, a folder with a file for each split, or `hf:OWNER/NAME[:CONFIG][:SPLIT]`. None takes a set of
            `KNOWN` from FlashRAG's collection on the hub.
        split: what the questions are for; goes into ids and `extra_info`. It also chooses the file of a folder and the
            split on the hub.
        format: a key of `FORMATS`, or "auto" to recognise it by its content.
        source: the set's name; the source's key if None. A file that names its sets itself keeps their names.
        passages: the set's own file of passages, where the questions do not carry them; for pooled corpora.
        keep_ids: file with the ids of the questions to keep: lines, a JSON list, or a JSON object's keys.
        subsets: the sets to keep of a file of several, such as MIRAGE's; all if empty.
    """

    path: str | None = None
    split: Split | None = None
    format: str = AUTO
    source: str | None = None
    passages: Path | None = None
    keep_ids: Path | None = None
    subsets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format != AUTO and self.format not in FORMATS:
            near = nearest(self.format, list(FORMATS))
            raise ValueError(f"format={self.format!r}; did you mean {near!r}? Formats: auto, {', '.join(FORMATS)}")
        if self.source is not None and (not self.source.strip() or "/" in self.source):
            raise ValueError(f"source={self.source!r}; expected a name without a slash")


@dataclass(frozen=True, slots=True)
class Item:
    """What one row holds; a row that cannot be used has neither question nor documents, but a `fault`.

    Attributes:
        place: file and line, for messages.
        gold: ids of the gold passages, among `documents` or in the set's own file of passages.
        fault: why the row cannot be used.
        format: the name of the row's format.
        row: the row itself, for what else it says.
    """

    place: str
    question: Question | None = None
    documents: tuple[Document, ...] = ()
    gold: tuple[str, ...] = ()
    fault: str = ""
    format: str = ""
    row: Row = field(default_factory=dict)


def locate(key: str, config: SourceConfig) -> str:
    """Return the file or the name on the hub that a source is read from.

    Raises:
        ConfigError: an unknown set without a path, or no split where one is needed to choose.
        DataError: a folder without a file for the split.
    """
    if config.path is None:
        return _known(key, config)
    folder = Path(config.path)
    if config.path.startswith(hub.PREFIX) or not folder.is_dir():
        return config.path
    names = hub.SPLIT_NAMES[_split(key, config)]
    for name in names:
        for ending in _ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return str(folder / f"{name}{ending}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(
        f"sources.{key}: {folder} has no split {config.split} ({' or '.join(names)}.jsonl, .json or .parquet); found "
        f"{found}. Give the path of one of its files"
    )


def read_source(key: str, config: SourceConfig, question_mark: bool = True, limit: int | None = None) -> Iterator[Item]:
    """Yield what a source holds, row by row, faulty rows included.

    Args:
        question_mark: end questions with a question mark, as the published preparation does (not those of MIRAGE,
            PubMedQA and published parquets).
        limit: stop after so many rows.

    Raises:
        ConfigError: as `locate`.
        DataError: nothing there, a file that cannot be read to its end, or of no format that is known.
    """
    path = locate(key, config)
    hubbed = path.startswith(hub.PREFIX)
    rows = hub.read_hub(path, _split(key, config)) if hubbed else read_file(Path(path))
    format, rows = _recognised(path, rows, config.format)
    ids = _listed_ids(config.keep_ids) if config.keep_ids is not None else None
    items = (_item(key, config, format, question_mark, n, row) for n, row in enumerate(_unfolded(format, rows)))
    return islice((item for item in items if _kept(item, config, ids)), limit)


def _known(key: str, config: SourceConfig) -> str:
    name = config.source or key
    if name not in KNOWN:
        near = nearest(name, list(KNOWN))
        raise ConfigError(
            f"sources.{key}: unknown data set {name!r} and no path; did you mean {near!r}? Known: {', '.join(KNOWN)}; "
            f"any other needs sources.{key}.path"
        )
    split = _split(key, config)
    if split not in KNOWN[name]:
        raise ConfigError(f"sources.{key}: {name} has no split {split}; it has {', '.join(KNOWN[name])}")
    return f"{_FLASHRAG}:{name}:{KNOWN[name][split]}"


def _split(key: str, config: SourceConfig) -> str:
    if config.split is None:
        raise ConfigError(f"sources.{key}.split is missing; expected train, validation or test")
    return config.split


def _recognised(path: str, rows: Iterator[Located], name: str) -> tuple[Format, Iterator[Located]]:
    """Return the format, and the rows again from the first one."""
    start = list(islice(rows, _LOOKED_AT))
    rows = chain(start, rows)
    if name != AUTO:
        return FORMATS[name], rows
    readable = [located.row for located in start if located.row is not None]
    format = recognise(readable)
    if format is None:
        reasons = [f"{located.place}: {located.reason}" for located in start if located.row is None]
        keys = f"its rows have the keys {', '.join(readable[0]) or '(none)'}" if readable else "; ".join(reasons[:1])
        known = "; ".join(f"{each.name}: {each.expects}" for each in FORMATS.values())
        raise DataError(f"{path} is of no known format ({keys or 'it holds no row'}). Known are {known}")
    return format, rows


def _unfolded(format: Format, rows: Iterable[Located]) -> Iterator[Located]:
    for located in rows:
        if located.row is None or not format.nested(located.row):
            yield located
            continue
        try:
            for place, row in format.unfold(located.row):
                yield Located(f"{located.place}: {place}", row)
        except ValueError as cause:
            raise DataError(f"{located.place}: {cause}; expected {format.name}: {format.expects}") from cause


def _item(key: str, config: SourceConfig, format: Format, question_mark: bool, number: int, located: Located) -> Item:
    if located.row is None:
        return Item(located.place, fault=located.reason)
    try:
        entry = format.read(located.row)
        question = _question(key, config, entry, number, question_mark and format.adds_question_mark)
        for text in _texts(question, entry):
            text.encode()
    except UnicodeEncodeError:
        return Item(located.place, fault="an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it")
    except ValueError as cause:
        return Item(located.place, fault=str(cause))
    return Item(located.place, question, entry.documents, entry.gold, format=format.name, row=located.row)


def _question(key: str, config: SourceConfig, entry: Entry, number: int, question_mark: bool) -> Question | None:
    if entry.complete is not None:
        return entry.complete
    if not entry.question:
        return None
    source = entry.source or config.source or key
    text = entry.question
    return Question(
        id=f"{source}/{config.split or 'unknown'}/{entry.id or number}",
        text=text if not question_mark or text.endswith("?") else f"{text}?",
        answers=entry.answers,
        source=source,
        gold_titles=entry.gold_titles,
        kind=entry.kind,
        extra=entry.extra,
    )


def _texts(question: Question | None, entry: Entry) -> Iterator[str]:
    if question is not None:
        yield from (question.id, question.text, question.kind, *question.answers, *question.gold_titles)
    for document in entry.documents:
        yield from (document.title, document.text)


def _kept(item: Item, config: SourceConfig, ids: frozenset[str] | None) -> bool:
    question = item.question
    if question is None:
        return True
    if config.subsets and question.source not in config.subsets:
        return False
    return ids is None or question.id.split("/", 2)[-1] in ids


def _listed_ids(path: Path) -> frozenset[str]:
    lines = [line for _, line in text_lines(path)]
    try:
        value: Any = json.loads("\n".join(lines))
    except ValueError:
        value = lines
    value = list(value) if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not all(isinstance(id, str | int) for id in value):
        raise DataError(f"{path}: expected ids, one a line, as a JSON list or as the keys of a JSON object")
    return frozenset(str(id).strip() for id in value)


def with_split(config: SourceConfig, split: Split) -> SourceConfig:
    """Return the source with a split, where it has none."""
    return config if config.split is not None else replace(config, split=split)
