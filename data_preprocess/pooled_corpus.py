"""Pool the passages that question sets ship into one corpus, so that real runs need no download of Wikipedia.

    python -m data_preprocess.pooled_corpus output=data/pool/corpus.jsonl \\
        sources.hotpotqa.path=hotpot_dev_distractor_v1.json sources.wiki2.path=2wiki/dev.json

Sources are those of `data_preprocess.qa`, with or without a split (it only goes into the questions' ids, `test` if none
is given); sets of passages without questions may be named too. A page that comes twice is kept once: two passages are
the same when title and text differ in case, punctuation, articles and spaces at most. Its id is a hash of just that, so
a passage has the same id in every pool. Beside the corpus lie `queries.jsonl` and `qrels/SPLIT.tsv` (and for each set
`qrels/SET-SPLIT.tsv`), which say which passages hold each question's answer: together a BEIR folder, for
`python -m verl.retrieval.evaluate`. `summary.md` says for how many questions all gold titles are in the pool.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_preprocess.finished import file_state, finish, finished, locked
from data_preprocess.pool import Pool
from data_preprocess.qa import OnError
from data_preprocess.readers.hub import PREFIX
from data_preprocess.readers.mirage import retrieval_query
from data_preprocess.readers.source import Item, SourceConfig, locate, read_source, with_split
from verl.config import run_entry
from verl.errors import ConfigError, DataError
from verl.evaluation.journal import write_whole
from verl.rewards.recall import title_key
from verl.typed import encode
from verl.types import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolConfig:
    """What to pool.

    Attributes:
        output: the corpus to write, a `contents` jsonl; its folder receives the rest. Called `corpus.jsonl`, it makes
            that folder a BEIR folder.
        sources: as in `data_preprocess.qa.QaConfig`; a set's own file of passages is its `passages`.
        words: cut longer passages into some of at most so many words (100 as in wiki-18); 0 leaves them whole.
        question_mark, limit, on_error: as in `data_preprocess.qa.QaConfig`, so that both give questions the same text.
    """

    output: Path
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    words: int = 0
    question_mark: bool = True
    limit: int | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if self.words < 0:
            raise ValueError(f"words={self.words}; expected at least 1, or 0 to leave passages whole")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or null for all rows")


@dataclass(frozen=True, slots=True)
class Pooled:
    """What one source gave; a line of the summary.

    Attributes:
        passages: that the source ships, as often as it ships them.
        added: new passages, counted after cutting.
        malformed: rows that were skipped.
        with_titles: questions that name their gold passages.
        complete: those of them whose gold titles are all in the finished pool.
    """

    source: str
    passages: int
    added: int
    malformed: int
    questions: int
    with_titles: int
    complete: int


def pool_corpus(config: PoolConfig) -> list[Pooled]:
    """Build the corpus as configured, unless that was done before from the same files in the same way.

    Raises:
        ConfigError: no sources, or an unknown set.
        DataError: a source cannot be read, a row cannot be used, a question's id is not unique, or there is no passage.
    """
    if not config.sources:
        raise ConfigError("sources is empty; name one, for example sources.hotpotqa.path=hotpot_dev_distractor_v1.json")
    sources = {key: with_split(source, "test") for key, source in config.sources.items()}
    inputs = [encode(config), [_state(key, source) for key, source in sources.items()]]
    folder = config.output.parent
    with locked(folder):
        mark = folder / f"{config.output.name}.build.json"
        summary = folder / "summary.md"
        rows = finished(mark, inputs, [config.output, folder / "queries.jsonl", summary])
        if rows is not None:
            logger.info("%s is built already; nothing to do", config.output)
            return [Pooled(**row) for row in rows]
        pooled = _write(config, sources, folder)
        write_whole(summary, summary_table(pooled))
        finish(mark, inputs, encode(pooled))
    return pooled


def summary_table(rows: Sequence[Pooled]) -> str:
    """Lay out what the sources gave as a markdown table."""
    lines = [
        "| source | passages | added | malformed | questions | with gold titles | all titles in the pool |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = Pooled("all", *(sum(counts) for counts in zip(*(_counts(row) for row in rows), strict=True)))
    for row in [*rows, total]:
        share = f"{row.complete:,} ({100 * row.complete / row.with_titles:.1f} %)" if row.with_titles else "–"
        cells = [row.source, *(f"{count:,}" for count in _counts(row)[:-1]), share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _counts(row: Pooled) -> tuple[int, ...]:
    return row.passages, row.added, row.malformed, row.questions, row.with_titles, row.complete


def _state(key: str, source: SourceConfig) -> Any:
    path = locate(key, source)
    files = [] if path.startswith(PREFIX) else [Path(path)]
    files += [extra for extra in (source.passages, source.keep_ids) if extra is not None]
    return [key, path, [file_state(file) for file in files]]


def _write(config: PoolConfig, sources: Mapping[str, SourceConfig], folder: Path) -> list[Pooled]:
    """Write corpus, queries and judgements; they are moved to their names when all are complete, the corpus last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pooling-") as temporary:
        work = Path(temporary)
        with (work / "corpus").open("w", encoding="utf-8") as file:
            pool, judgements = Pool(file, config.words), _Judgements()
            read = [_Reading(key, source, config, pool, judgements) for key, source in sources.items()]
            for reading in read:
                reading.run()
        if not len(pool):
            raise DataError(f"sources {', '.join(sources)} ship no passages; name sets that do, or their `passages`")
        judgements.write(work)
        config.output.unlink(missing_ok=True)
        shutil.rmtree(folder / "qrels", ignore_errors=True)
        for name in ("queries.jsonl", "qrels"):
            (work / name).rename(folder / name)
        (work / "corpus").rename(config.output)
    logger.info("%s: %d passages", config.output, len(pool))
    return [reading.line(pool) for reading in read]


class _Judgements:
    """Which passages hold the answers of which questions."""

    def __init__(self) -> None:
        self._queries: dict[str, str] = {}
        self._relevant: dict[str, list[tuple[str, str]]] = {}

    def add(self, question: Question, split: str, passages: Sequence[str], place: str) -> None:
        if question.id in self._queries:
            raise DataError(f"{place}: id {question.id!r} was used before; give one of the sources another `source`")
        self._queries[question.id] = retrieval_query(question)
        for name in (split, f"{question.source.replace('/', '_')}-{split}"):
            self._relevant.setdefault(name, []).extend((question.id, passage) for passage in passages)

    def write(self, folder: Path) -> None:
        """Write `queries.jsonl` and the files in `qrels` as BEIR has them."""
        with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
            for id, text in self._queries.items():
                file.write(json.dumps({"_id": id, "text": text}, ensure_ascii=False) + "\n")
        (folder / "qrels").mkdir()
        for name, pairs in self._relevant.items():
            with (folder / "qrels" / f"{name}.tsv").open("w", encoding="utf-8") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                file.writelines(f"{question}\t{passage}\t1\n" for question, passage in pairs)


class _Reading:
    """Pours one source into the pool."""

    def __init__(self, key: str, source: SourceConfig, config: PoolConfig, pool: Pool, judgements: _Judgements) -> None:
        self._key = key
        self._source = source
        self._config = config
        self._pool = pool
        self._judgements = judgements
        self._named: dict[str, tuple[str, ...]] = {}
        self._gold: list[frozenset[str]] = []
        self._passages = self._added = self._malformed = self._questions = 0

    def run(self) -> None:
        """Read the source.

        Raises:
            DataError: as `pool_corpus`.
        """
        before = len(self._pool)
        for item in self._items():
            if not item.fault:
                self._take(item)
            elif self._config.on_error == "raise":
                raise DataError(f"{item.place}: {item.fault}; mend the row, or pass on_error=skip")
            else:
                self._malformed += 1
        self._added = len(self._pool) - before

    def line(self, pool: Pool) -> Pooled:
        """Return the summary's line; the pool is complete by now."""
        complete = sum(titles <= pool.titles for titles in self._gold)
        counts = (self._passages, self._added, self._malformed, self._questions, len(self._gold), complete)
        return Pooled(self._key, *counts)

    def _items(self) -> Iterator[Item]:
        if self._source.passages is not None:
            yield from read_source(self._key, SourceConfig(path=str(self._source.passages)))
        yield from read_source(self._key, self._source, self._config.question_mark, self._config.limit)

    def _take(self, item: Item) -> None:
        ids = {document.id: self._pool.add(document) for document in item.documents}
        self._passages += len(item.documents)
        question = item.question
        if question is None:
            self._named.update((id, pooled) for id, pooled in ids.items() if id)
            return
        self._questions += 1
        if question.gold_titles:
            self._gold.append(frozenset(map(title_key, question.gold_titles)))
        gold = [pooled for id in item.gold for pooled in ids.get(id) or self._named.get(id, ())]
        self._judgements.add(question, str(self._source.split), list(dict.fromkeys(gold)), item.place)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("pooled_corpus", PoolConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: PoolConfig) -> None:
    sys.stdout.write(summary_table(pool_corpus(config)))


if __name__ == "__main__":
    sys.exit(main())
