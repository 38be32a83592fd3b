"""Build question parquets out of published sets: one file a split, in the published columns.

    python -m data_preprocess.qa output=data/qa sources.nq.split=train sources.nq_test.source=nq \\
        sources.nq_test.split=test sources.wiki2.source=2wikimultihopqa sources.wiki2.path=2wiki/dev.json \\
        sources.wiki2.split=test

A source's key is its set's name unless `source` says another (a key cannot begin with a digit). It is a local file in
any known format, or a set on the Hugging Face hub (`data_preprocess.readers`). Each is read once into
`output/sources/KEY.parquet`; from these follow `output/{train,validation,test}.parquet`, without questions worded
alike, without training questions that a held-out source asks too, and sampled as published. `output/summary.md` says
what became of every question. A build that was stopped goes on, and one that is finished does nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from data_preprocess.finished import file_state, finish, finished, locked
from data_preprocess.qa_select import Kept, Selection, select_questions, summary_table
from data_preprocess.readers.hub import PREFIX
from data_preprocess.readers.source import Item, SourceConfig, Split, locate, read_source
from verl.agent.grammar.base import Message
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.config import run_entry
from verl.errors import ConfigError, DataError
from verl.evaluation.journal import write_whole
from verl.records import write_questions
from verl.typed import encode, nearest
from verl.types import Question

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
BARE = "question"
_PROTOCOLS: dict[str, type] = {protocol.protocol: protocol for protocol in get_args(SearchConfig)}
_VERSION = 1
"""Of what a source's parquet holds; raised when readers come to read something else out of the same file."""


@dataclass(frozen=True)
class SampleConfig:
    """At most so many questions of each set, by split; null for all. The defaults are the published evaluation's."""

    train: int | None = None
    validation: int | None = 3000
    test: int | None = 3000

    def __post_init__(self) -> None:
        for item in fields(self):
            count = getattr(self, item.name)
            if count is not None and count < 1:
                raise ValueError(f"{item.name}={count}; expected at least 1, or null for all questions")


@dataclass(frozen=True)
class QaConfig:
    """What to build.

    Attributes:
        output: folder of the parquets and the summary.
        sources: by any name; those with the same `source` and split go together.
        prompt: what the `prompt` column asks: "question" for the bare question, or a protocol for its published prompt.
        seed: of the sample; the published one. The same as pandas' `sample(random_state=seed)` of each set.
        limit: read only the first so many rows of each source, to try a build out.
        question_mark: end questions with a question mark, as the published preparation does.
        dedupe: drop questions worded like an earlier one of the same set and split.
        dedupe_across: also those worded like one of a set named before it.
        decontaminate: drop training questions that a validation or test source asks too.
        on_error: what happens at a row that cannot be used: raise, or skip it, which is counted.
    """

    output: Path
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    prompt: str = BARE
    sample: SampleConfig = field(default_factory=SampleConfig)
    seed: int = 42
    limit: int | None = None
    question_mark: bool = True
    dedupe: bool = True
    dedupe_across: bool = False
    decontaminate: bool = True
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if self.prompt != BARE and self.prompt not in _PROTOCOLS:
            near = nearest(self.prompt, [BARE, *_PROTOCOLS])
            raise ValueError(f"prompt={self.prompt!r}; did you mean {near!r}? One of {BARE}, {', '.join(_PROTOCOLS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or null for all rows")


@dataclass(frozen=True, slots=True)
class Read:
    """One source, read.

    Attributes:
        rows: usable rows by set.
        malformed: rows that were skipped.
    """

    path: Path
    rows: Mapping[str, int]
    malformed: int


def build(config: QaConfig) -> list[Kept]:
    """Build as configured.

    Returns:
        What became of the questions of each set and split, as in `summary.md`.

    Raises:
        ConfigError: no sources, an unknown set or format, or no split.
        DataError: a source cannot be read, a row cannot be used, ids are not unique, or nothing is left of a split.
    """
    if not config.sources:
        raise ConfigError("sources is empty; name one, for example sources.nq.split=train")
    inputs = {key: _inputs(key, source, config) for key, source in config.sources.items()}
    with locked(config.output):
        read = {key: read_once(key, source, inputs[key], config) for key, source in config.sources.items()}
        return _write_splits(config, read, inputs)


def read_once(key: str, source: SourceConfig, inputs: Any, config: QaConfig) -> Read:
    """Read one source into its parquet, unless that was done before from the same file in the same way.

    Raises:
        DataError: as `build`.
    """
    path = config.output / "sources" / f"{key}.parquet"
    mark = path.with_suffix(".json")
    counts = finished(mark, inputs, [path])
    if counts is None:
        reading = _Reading(key, read_source(key, source, config.question_mark, config.limit), config.on_error)
        write_questions(path, reading.questions(), str(source.split))
        if not reading.rows:
            raise DataError(f"sources.{key}: {locate(key, source)} holds no question that can be used")
        counts = {"rows": reading.rows, "malformed": reading.malformed}
        finish(mark, inputs, counts)
        logger.info("%s: %d questions, %d rows skipped", key, sum(reading.rows.values()), reading.malformed)
    else:
        logger.info("%s: read before", key)
    return Read(path, counts["rows"], counts["malformed"])


def render_prompt(name: str) -> Callable[[Question], str]:
    """Return what the `prompt` column holds for a question: the last message of the user in the protocol's prompt."""
    if name == BARE:
        return lambda question: question.text
    grammar = build_grammar(_PROTOCOLS[name](), _no_model)

    def render(question: Question) -> str:
        messages = grammar.prompt_messages(question)
        return next(message["content"] for message in reversed(messages) if message["role"] == "user")

    return render


async def _no_model(messages: Sequence[Message]) -> str:
    raise AssertionError("rendering a prompt asks no model")


class _Reading:
    """Reads one source and counts; ids must be unique within it."""

    def __init__(self, key: str, items: Iterator[Item], on_error: OnError) -> None:
        self._key = key
        self._items = items
        self._on_error = on_error
        self._places: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.malformed = 0

    def questions(self) -> Iterator[Question]:
        """Yield the questions that can be used.

        Raises:
            DataError: a row cannot, and rows are not to be skipped.
        """
        for item in self._items:
            fault = item.fault or self._clash(item)
            if fault:
                if self._on_error == "raise":
                    raise DataError(f"{item.place}: {fault}; mend the row, or pass on_error=skip")
                self.malformed += 1
            elif item.question is not None:
                self.rows[item.question.source] = self.rows.get(item.question.source, 0) + 1
                yield item.question

    def _clash(self, item: Item) -> str:
        if item.question is None:
            return ""
        id = item.question.id
        if id in self._places:
            return f"id {id!r} was used at {self._places[id]}; ids must be unique"
        self._places[id] = item.place
        return ""


def _inputs(key: str, source: SourceConfig, config: QaConfig) -> Any:
    """Return everything that a source's parquet depends on; raises ConfigError before anything is read."""
    if source.split is None:
        raise ConfigError(f"sources.{key}.split is missing; expected {', '.join(get_args(Split))}")
    path = locate(key, source)
    files = [] if path.startswith(PREFIX) else [file_state(Path(path))]
    files += [file_state(source.keep_ids)] if source.keep_ids is not None else []
    return [_VERSION, key, encode(source), path, files, config.limit, config.question_mark, config.on_error]


def _write_splits(config: QaConfig, read: Mapping[str, Read], inputs: Any) -> list[Kept]:
    splits = [split for split in get_args(Split) if _of_split(config, split)]
    outputs = [config.output / f"{split}.parquet" for split in splits]
    mark = config.output / "build.json"
    everything = [inputs, encode(config)]
    rows = finished(mark, everything, [*outputs, config.output / "summary.md"])
    if rows is not None:
        logger.info("%s is built already; nothing to do", config.output)
        return [Kept(**row) for row in rows]
    paths = {split: {key: read[key].path for key in _of_split(config, split)} for split in splits}
    selection = Selection(config.dedupe, config.dedupe_across, config.decontaminate, config.seed, encode(config.sample))
    chosen = select_questions(paths, selection)
    prompt = render_prompt(config.prompt)
    for output in outputs:  # those of two builds never lie side by side
        output.unlink(missing_ok=True)
    kept: list[Kept] = []
    for split, output in zip(splits, outputs, strict=True):
        tally = chosen[split].tally(_skipped(config, read, split))
        if not any(row.written for row in tally):
            raise DataError(f"no question of the split {split} is left:\n{summary_table(tally)}")
        write_questions(output, chosen[split].questions(paths[split]), split, prompt)
        kept += tally
    write_whole(config.output / "summary.md", summary_table(kept))
    finish(mark, everything, encode(kept))
    return kept


def _of_split(config: QaConfig, split: str) -> list[str]:
    return [key for key, source in config.sources.items() if source.split == split]


def _skipped(config: QaConfig, read: Mapping[str, Read], split: str) -> dict[str, int]:
    """Return the skipped rows by set; those of a file of several sets under the source's key."""
    skipped: dict[str, int] = {}
    for key in _of_split(config, split):
        if read[key].malformed:
            sets = list(read[key].rows)
            name = sets[0] if len(sets) == 1 else key
            skipped[name] = skipped.get(name, 0) + read[key].malformed
    return skipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("qa", QaConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: QaConfig) -> None:
    sys.stdout.write(summary_table(build(config)))


if __name__ == "__main__":
    sys.exit(main())
