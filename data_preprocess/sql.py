"""Turn BIRD's and Spider's questions into question parquets for text-to-SQL.

    python -m data_preprocess.sql --dataset spider --source spider_data --save_dir data/spider

The source is the folder of a set:

- BIRD: `train.json` and `dev.json`, there or in `train/` and `dev/`, with `train_databases` and `dev_databases`. Its
  dev is the test set, for nobody has the other one's answers;
- Spider: `train_spider.json` and `train_others.json` (or `train_subset`), `dev.json`, `test.json`, and `database`.
  Where there is no test, dev is it;
- the published parquets of both, with or without reasoning: `train` and `test`, columns `data_source`, `question`,
  `db_id`, `sql`, `knowledge`. Their `val` has rows of test, so it is left alone;
- `sql_all`: a folder with `bird` and `spider`, each as above.

Files may be `.json`, `.jsonl` or `.parquet`. A question's text is the schema of its database (BIRD: the CREATE TABLE
statements that the database holds; Spider: its `schema.sql` without the lines that insert, else as BIRD's, else drawn
from `tables.json`), BIRD's external knowledge, and the question; its answer is the gold statement. `extra` has `sql`,
`db_id`, `db_path` (from `--databases`, which is what `reward.sql.databases` has to be), `question` and `knowledge`.

Test questions all stay. Train leaves out prompts of more than 1,000 words, as published, and, unless told otherwise,
questions whose gold does not run or returns nothing, which could never be paid. Validation comes from Spider's dev or
else from train, never from test; splits share no question and no gold statement of one database.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_preprocess.disjoint import SPLITS, Separated, check_disjoint, separate
from data_preprocess.readers.base import Row, optional_text, shown, text_of
from data_preprocess.readers.files import read_file
from data_preprocess.sql_schema import Schemas, SchemaSource
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.errors import DataError, SearchAgentError
from verl.records import write_questions
from verl.retrieval.engines.sql import SqlEngine
from verl.retrieval.engines.sql_files import find_database
from verl.rewards.sql_config import SqlConfig
from verl.rewards.text import normalise
from verl.types import Question

logger = logging.getLogger(__name__)

VALIDATION = 200
SEED = 42
"""The published seed of train's order."""
MAX_WORDS = 1000
"""The published bound of a training prompt, in words between white space."""
COMBINED = "sql_all"

_ENDINGS = ("parquet", "jsonl", "json")


@dataclass(frozen=True, slots=True)
class DataSet:
    """One published set; the names of its files without their endings, of each split the first group that is there.

    Attributes:
        schema: where the text of a schema comes from.
        train, test: alternatives; all files of the first one that has any are read.
        validation: read where it is not the test set.
    """

    schema: SchemaSource
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    validation: tuple[tuple[str, ...], ...] = ()


DATASETS = {
    "bird": DataSet("database", (("train", "train/train"),), (("test",), ("dev", "dev/dev"))),
    "spider": DataSet(
        "file",
        (("train_spider", "train_others"), ("train",), ("train_subset",)),
        (("test",), ("dev",)),
        (("dev",),),
    ),
}


@dataclass(frozen=True)
class Options:
    """How a set is prepared.

    Attributes:
        databases: folder that `db_path` starts from; the source if None.
        validation: most validation questions.
        reasoning: which prompt is written; training builds its own.
        run_golds: leave out of train what could never be paid.
        timeout_s: of one gold.
        sample_rows: of each table, shown in the schema.
    """

    databases: Path | None = None
    validation: int = VALIDATION
    seed: int = SEED
    reasoning: bool = True
    run_golds: bool = True
    timeout_s: float = 30.0
    sample_rows: int = 0


@dataclass(frozen=True)
class Place:
    """Where a set and its databases are; a database counts only inside `databases`."""

    source: Path
    databases: Path
    schemas: Schemas

    def find(self, db_id: str, stated: str) -> Path | None:
        """Return the file of a database, looked for among the set's own first; None if it is not there."""
        inside = self.databases.resolve()
        found = (find_database(root, db_id, stated) for root in (self.source, self.databases))
        return next((path for path in found if path is not None and path.is_relative_to(inside)), None)


@dataclass
class Read:
    """Questions by split, and how many were left out and why."""

    splits: dict[str, list[Question]]
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, split: str, kept: list[Question], why: str) -> None:
        """Replace the questions of a split by those that are kept."""
        self.dropped[why] += len(self.splits[split]) - len(kept)
        self.splits[split] = kept


def convert(name: str, source: Path, save_dir: Path, options: Options | None = None) -> Separated:
    """Write `{train,validation,test}.parquet`; the folder appears only when complete.

    Args:
        name: a key of `DATASETS`, or `sql_all`.

    Raises:
        DataError: a file is missing, a row cannot be read (names it), a database is missing, nothing is left of a
            split, or `save_dir` is not empty.
    """
    options = options or Options()
    if save_dir.exists() and any(save_dir.iterdir()):
        raise DataError(f"{save_dir} is not empty; pass a new folder")
    databases = options.databases or source
    if name == COMBINED:
        made = _merged([prepare(part, source / part, databases, options) for part in DATASETS], options.seed)
    else:
        made = prepare(name, source, databases, options)
    grammar = _grammar(options.reasoning)
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_dir.parent, prefix=f".{save_dir.name}-") as folder:
        for split, questions in made.splits.items():
            target = Path(folder) / "made" / f"{split}.parquet"
            write_questions(target, questions, split, lambda question: grammar.prompt_messages(question)[0]["content"])
        os.replace(Path(folder) / "made", save_dir)
    return made


def prepare(name: str, source: Path, databases: Path, options: Options) -> Separated:
    """Read one set and make its splits disjoint. Raises as `convert`."""
    place = Place(source, databases, Schemas(DATASETS[name].schema, source, options.sample_rows))
    read = Read({split: read_rows(name, found, place) for split, found in _paths(name, source).items()})
    grammar = _grammar(options.reasoning)

    def words(question: Question) -> int:
        return len(grammar.prompt_messages(question)[0]["content"].split())

    train = [question for question in read.splits["train"] if words(question) <= MAX_WORDS]
    read.keep("train", train, f"train questions with a prompt of more than {MAX_WORDS} words")
    if options.run_golds:
        asyncio.run(_check_golds(read, databases, options.timeout_s))
    made = separate(read.splits, options.validation, options.seed, keys)
    return Separated(made.splits, {**{why: count for why, count in read.dropped.items() if count}, **made.dropped})


def keys(question: Question) -> tuple[str, ...]:
    """Return what questions of two splits must not share: the wording or the gold, of one set's database."""
    extra = question.extra
    database = f"{question.source.partition('_')[0]}/{extra['db_id']}"
    asked = normalise(extra["question"]) or extra["question"]
    return f"text:{database}:{asked}", f"sql:{database}:{' '.join(extra['sql'].lower().split())}"


def read_rows(name: str, paths: Iterable[Path], place: Place) -> list[Question]:
    """Read the questions of a split's files, raw or published.

    Raises:
        DataError: a file or a row cannot be read; says where and what was expected.
    """
    questions = []
    for path in paths:
        for number, located in enumerate(read_file(path)):
            if located.row is None:
                raise DataError(f"{located.place}: {located.reason}")
            try:
                questions.append(_question(name, located.row, f"{path.stem}/{number}", place))
            except ValueError as cause:
                raise DataError(f"{located.place}: {cause}") from cause
    return questions


def _question(name: str, row: Row, where: str, place: Place) -> Question:
    """Read one row; ValueError with the reason if it cannot be."""
    source = optional_text(row, "data_source") or name
    if not source.startswith(name):
        raise ValueError(f"data_source is {shown(source)}; expected one that starts with {name}")
    sql = next((row[key] for key in ("SQL", "query", "sql") if isinstance(row.get(key), str)), _target(row))
    extra = {
        "sql": text_of({"sql": sql}, "sql"),
        "question": text_of(row, "question"),
        "knowledge": optional_text(row, "evidence", "knowledge"),
    }
    info = row.get("extra_info")
    stated = optional_text(info, "db_path") if isinstance(info, Mapping) else ""
    db_id = optional_text(row, "db_id") or Path(stated).stem
    if not db_id:
        raise ValueError(f"db_id is {shown(row.get('db_id'))}; expected the name of a database")
    path = place.find(db_id, stated)
    extra["db_id"] = db_id
    if path is not None:
        extra["db_path"] = path.relative_to(place.databases.resolve()).as_posix()
    schema = place.schemas.of(db_id, path) or _schema_in_prompt(row, extra["question"])
    if not schema:
        raise ValueError(f"there is no database {shown(db_id)} in {place.databases}, and no schema; pass --databases")
    extra = {key: value for key, value in extra.items() if value}
    return Question(f"{source}/{where}", question_text(schema, extra), (extra["sql"],), source, extra=extra)


def question_text(schema: str, extra: Mapping[str, str]) -> str:
    """Return what the policy reads: schema, knowledge if there is any, and question."""
    knowledge = f"External Knowledge:\n{extra['knowledge']}\n\n" if extra.get("knowledge") else ""
    return f"Database Schema:\n{schema}\n\n{knowledge}Question:\n{extra['question']}"


def _target(row: Row) -> object:
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    return truth.get("target") if isinstance(truth, Mapping) else None


def _schema_in_prompt(row: Row, question: str) -> str:
    """Return the schema that a published prompt shows; blank if there is none."""
    prompt = row.get("prompt")
    first = prompt[0] if isinstance(prompt, Sequence) and prompt else None
    content = first.get("content") if isinstance(first, Mapping) else None
    if not isinstance(content, str):
        return ""
    schema = content.partition("Database Schema:")[2]
    at = schema.rfind(question)
    return schema[: max(at, 0)].partition("External Knowledge:")[0].strip()


def _paths(name: str, source: Path) -> dict[str, list[Path]]:
    """Return the files of each split."""
    dataset = DATASETS[name]
    train, test = _first_group(source, dataset.train), _first_group(source, dataset.test)
    for split, found, groups in (("train", train, dataset.train), ("test", test, dataset.test)):
        if not found:
            names = " or ".join(f"{stem}.json" for group in groups for stem in group)
            raise DataError(f"{source} has no {names}, for {split}; expected the folder of {name}")
    validation = _first_group(source, dataset.validation)
    return {"train": train, "test": test} | ({"validation": validation} if validation and validation != test else {})


def _first_group(source: Path, groups: Iterable[tuple[str, ...]]) -> list[Path]:
    found = ([path for stem in group for path in _named(source, stem)] for group in groups)
    return next(filter(None, found), [])


def _named(source: Path, stem: str) -> Iterator[Path]:
    path = next((path for end in _ENDINGS if (path := source / f"{stem}.{end}").is_file()), None)
    return iter([path] if path else [])


async def _check_golds(read: Read, databases: Path, timeout_s: float) -> None:
    """Leave out what cannot be scored, of train also what can never be paid; test keeps all, and is warned about."""
    engine = SqlEngine(SqlConfig(databases, timeout_s=timeout_s))
    try:
        for split, questions in read.splits.items():
            results = await asyncio.gather(*(engine(question, question.extra["sql"]) for question in questions))
            judged = list(zip(questions, results, strict=True))
            failed = Counter(result.error for result in results if result.error)
            empty = sum(not result.error and not result.rows for result in results)
            if split == "test":
                for error, count in failed.items():
                    logger.warning(
                        "%d of %d test golds fail (%s); they stay, and cannot be right", count, len(results), error
                    )
                continue
            for error in failed:
                read.dropped[f"{split} questions whose gold fails: {error}"] += failed[error]
            if split == "train":
                read.dropped["train questions whose gold returns nothing"] += empty
            read.splits[split] = [q for q, result in judged if not result.error and (result.rows or split != "train")]
    finally:
        await engine.aclose()


def _merged(parts: Sequence[Separated], seed: int) -> Separated:
    """Put sets together, train in one order."""
    splits = {split: [question for part in parts for question in part.splits[split]] for split in SPLITS}
    random.Random(seed).shuffle(splits["train"])
    check_disjoint(splits, keys)
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    return Separated({split: tuple(questions) for split, questions in splits.items()}, dict(dropped))


def _grammar(reasoning: bool) -> DeepRetrievalGrammar:
    return DeepRetrievalGrammar(DeepRetrievalConfig(task="sql", reasoning=reasoning))


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.sql", description="Text-to-SQL questions as question parquets."
    )
    parser.add_argument("--dataset", required=True, choices=[*DATASETS, COMBINED])
    parser.add_argument("--source", required=True, help="folder of the set; for sql_all one with bird and spider in it")
    parser.add_argument("--save_dir", required=True, help="folder to write")
    parser.add_argument("--databases", help="folder of the databases, as for reward.sql.databases; default: --source")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="most validation questions, of each set")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw of validation and of train's order")
    parser.add_argument("--no_reasoning", action="store_true", help="write prompts that ask for the statement alone")
    parser.add_argument("--keep_all", action="store_true", help="run no golds, and leave out none for what they return")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds that a gold may take")
    parser.add_argument("--sample_rows", type=int, default=0, help="rows of each table that the schema shows")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.validation < 1 or args.sample_rows < 0 or not args.timeout > 0:
        parser.error("expected --validation of at least 1, --sample_rows of 0 or more, and a positive --timeout")
    options = Options(
        databases=Path(args.databases) if args.databases else None,
        validation=args.validation,
        seed=args.seed,
        reasoning=not args.no_reasoning,
        run_golds=not args.keep_all,
        timeout_s=args.timeout,
        sample_rows=args.sample_rows,
    )
    try:
        made = convert(args.dataset, Path(args.source), Path(args.save_dir), options)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    for why, count in made.dropped.items():
        logger.info("left out %d %s", count, why)
    logger.info("wrote %s: %s", args.save_dir, ", ".join(f"{len(q)} {split}" for split, q in made.splits.items()))


if __name__ == "__main__":
    main()
