"""Your own documents and questions, as the corpus and the parquets that everything here works on.

    python -m data_preprocess.custom corpus --documents my_data/documents --output my_data/corpus.jsonl
    python -m data_preprocess.custom questions --questions my_data/questions.csv --output my_data

`docs/custom_data.md` goes on from there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_preprocess.cutting import count_words, cut
from data_preprocess.documents import Columns, csv_rows, read_documents
from data_preprocess.pool import passage_id
from data_preprocess.qa import OnError
from data_preprocess.qa_select import wording
from verl.errors import DataError, SearchAgentError
from verl.records import write_questions
from verl.retrieval.corpus_formats import Fault, read_corpus, source_files
from verl.rewards.recall import title_key
from verl.types import Document, Question

logger = logging.getLogger(__name__)

_ANSWER_COLUMN = re.compile(r"answers?(?:[_ ]?\d+)?|golden_answers")
_SPLITS = {"train": "train", "training": "train", "test": "test", "dev": "validation", "validation": "validation"}
_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class CorpusOptions:
    """What becomes of documents.

    Attributes:
        documents: a folder, or one file.
        output: the `contents` jsonl to write.
        words: most words of a passage.
    """

    documents: Path
    output: Path
    words: int = 100
    columns: Columns = field(default_factory=Columns)
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words}; expected at least 1")


@dataclass(frozen=True)
class QuestionsOptions:
    """What becomes of questions.

    Attributes:
        questions: csv or tsv with a header; see `docs/custom_data.md` for its columns.
        output: folder of the parquets, one a split.
        corpus: corpus in which every gold title must be; not checked if None.
        name: of the set; goes into ids.
        separator: between several answers, or several gold titles, in one cell.
        test_share: share of the questions that becomes the test split, where no column says which is which.
        seed: of that division.
    """

    questions: Path
    output: Path
    corpus: Path | None = None
    name: str = "custom"
    separator: str = "|"
    test_share: float = 0.2
    seed: int = 0
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test_share={self.test_share}; expected a share in [0, 1]")
        if not self.name.strip() or "/" in self.name:
            raise ValueError(f"name={self.name!r}; expected a name without a slash")
        if not self.separator:
            raise ValueError("separator is empty; expected for example |")


@dataclass(frozen=True, slots=True)
class CorpusCounts:
    """What a corpus was made of; `repeated` passages were left out, `skipped` documents could not be used."""

    documents: int
    passages: int
    words: int
    repeated: int
    skipped: int


class _Faults:
    """Raises at the first fault, or counts them and tells the first few."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.count = 0

    def meet(self, place: str, fault: str) -> None:
        if self._on_error == "raise":
            raise DataError(f"{place}: {fault}; mend it, or pass --on_error skip")
        self.count += 1
        if self.count <= _FAULTS_SHOWN:
            logger.warning("skipped %s: %s", place, fault)


def write_corpus(options: CorpusOptions) -> CorpusCounts:
    """Cut documents into passages and write them; passages are known as `FILE#NUMBER`, with the document's title.

    Raises:
        DataError: no documents, or one that cannot be used.
    """
    faults = _Faults(options.on_error)
    documents = words = repeated = 0
    seen: set[str] = set()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".corpus-") as folder:
        partial = Path(folder) / "corpus"
        with partial.open("w", encoding="utf-8") as file:
            for source in read_documents(options.documents, options.columns):
                if source.fault:
                    faults.meet(f"{options.documents}: {source.name}", source.fault)
                    continue
                documents += 1
                for number, text in enumerate(cut(source.text, options.words), start=1):
                    id = passage_id(source.title, text)
                    repeated += id in seen
                    if id not in seen:
                        seen.add(id)
                        words += count_words(text)
                        file.write(_line(Document(f"{source.name}#{number}", source.title, text)))
        if not seen:
            raise DataError(f"{options.documents}: none of the documents can be used")
        partial.rename(options.output)
    return CorpusCounts(documents, len(seen), words, repeated, faults.count)


def write_splits(options: QuestionsOptions) -> dict[str, int]:
    """Write `train.parquet` and `test.parquet` (and `validation.parquet`, where the table names such questions).

    Returns:
        The number of questions by split.

    Raises:
        DataError: a missing column, a row without question or answers, one worded like another, or a gold title that
            is not in the corpus.
    """
    titles = _titles(options.corpus) if options.corpus is not None else None
    asked = _questions(options, titles, _Faults(options.on_error))
    if not asked:
        raise DataError(f"{options.questions} holds no question that can be used")
    by_split: dict[str, list[Question]] = {}
    for question, split in _divided(asked, options):
        number = len(by_split.setdefault(split, []))
        id = question.id or str(number)
        by_split[split].append(replace(question, id=f"{options.name}/{split}/{id}"))
    for split, questions in by_split.items():
        write_questions(options.output / f"{split}.parquet", questions, split)
    return {split: len(questions) for split, questions in by_split.items()}


def _line(document: Document) -> str:
    id = re.sub(r"\s", "%20", document.id)  # run files of retrieval put ids between spaces
    return json.dumps({"id": id, "contents": document.contents}, ensure_ascii=False) + "\n"


def _questions(
    options: QuestionsOptions, titles: Mapping[str, str] | None, faults: _Faults
) -> list[tuple[Question, str]]:
    """Return the questions with the splits that the table gives them; "" where it gives none."""
    found: list[tuple[Question, str]] = []
    lines: dict[str | bytes, int] = {}
    for line, row in _rows(options.questions):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            question, split = _question(row, options), _split(row)
            _check_titles(question, titles)
            keys = [wording(question), *([question.id] if question.id else [])]
            if repeated := [lines[key] for key in keys if key in lines]:
                raise ValueError(f"its question or id is also line {repeated[0]}'s; make one row of them")
        except ValueError as cause:
            faults.meet(f"{options.questions}:{line}", str(cause))
            continue
        lines |= dict.fromkeys(keys, line)
        found.append((question, split))
    return found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path} cannot be read as UTF-8 ({cause}); expected a csv or tsv of questions") from cause
    return csv_rows(text, path.suffix.lower())


def _question(row: Mapping[str, str], options: QuestionsOptions) -> Question:
    """Read a row; the id is the table's own, or empty.

    Raises:
        ValueError: no question, or no answer.
    """
    columns = [name for name in row if _ANSWER_COLUMN.fullmatch(name)]
    if "question" not in row or not columns:
        raise ValueError(f"found the columns {', '.join(row)}; expected question, and answers or answer, answer_2, ...")
    answers = _parts(options.separator.join(row[name] for name in columns), options.separator)
    text = " ".join(row["question"].split())
    if not text or not answers:
        raise ValueError(f"question={text!r}, answers={list(answers)!r}; expected a question and at least one answer")
    return Question(
        id=row.get("id", "").strip(),
        text=text,
        answers=answers,
        source=options.name,
        gold_titles=_parts(row.get("gold_titles", ""), options.separator),
        kind=row.get("kind", "").strip(),
    )


def _parts(cell: str, separator: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in cell.split(separator) if part.strip()))


def _split(row: Mapping[str, str]) -> str:
    stated = row.get("split", "").strip().lower()
    if stated and stated not in _SPLITS:
        raise ValueError(f"split={stated!r}; expected train, validation or test, or no such column")
    return _SPLITS[stated] if stated else ""


def _check_titles(question: Question, titles: Mapping[str, str] | None) -> None:
    for title in question.gold_titles if titles is not None else ():
        if title_key(title) not in titles:
            near = difflib.get_close_matches(title_key(title), titles, n=1, cutoff=0.0)
            raise ValueError(f"gold title {title!r} is not in the corpus; did you mean {titles[near[0]]!r}?")


def _titles(corpus: Path) -> dict[str, str]:
    """Return the titles of a corpus by what two spellings have in common."""
    titles: dict[str, str] = {}
    for _, document in read_corpus(source_files(corpus)):
        if isinstance(document, Fault):
            raise DataError(str(document))
        titles.setdefault(title_key(document.title), document.title)
    return titles


def _divided(asked: Sequence[tuple[Question, str]], options: QuestionsOptions) -> list[tuple[Question, str]]:
    """Give a split to the questions without one: the test split to a seeded share of them, train to the others."""
    open_places = [place for place, (_, split) in enumerate(asked) if not split]
    count = round(options.test_share * len(open_places))
    if 0 < options.test_share < 1 and len(open_places) > 1:
        count = min(max(count, 1), len(open_places) - 1)
    test = set(random.Random(options.seed).sample(open_places, count))
    return [
        (question, split or ("test" if place in test else "train")) for place, (question, split) in enumerate(asked)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command = options.pop("command")
    try:
        if command == "corpus":
            columns = Columns(*(options.pop(f"{name}_column") for name in ("text", "title", "id")))
            counts = write_corpus(CorpusOptions(**options, columns=columns))
            sys.stdout.write(
                f"{options['output']}: {counts.passages} passages of {counts.words / counts.passages:.0f} words on "
                f"average from {counts.documents} documents; {counts.repeated} repeated passages left out, "
                f"{counts.skipped} documents skipped\n"
            )
        else:
            splits = write_splits(QuestionsOptions(**options))
            sys.stdout.writelines(
                f"{options['output'] / split}.parquet: {n} questions\n" for split, n in splits.items()
            )
    except (ValueError, SearchAgentError, OSError) as cause:
        parser.exit(1, f"error: {cause}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_preprocess.custom", description="Your own data.")
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="cut documents into the passages of a corpus")
    corpus.add_argument("--documents", type=Path, required=True, help="folder of txt, md, html, jsonl, csv and tsv")
    corpus.add_argument("--output", type=Path, required=True, help="the jsonl to write")
    corpus.add_argument("--words", type=int, default=CorpusOptions.words, help="most words of a passage (%(default)s)")
    for name in ("text", "title", "id"):
        corpus.add_argument(f"--{name}_column", default=getattr(Columns(), name), help="of tables (%(default)s)")
    questions = commands.add_parser("questions", help="turn a table of questions into parquets")
    questions.add_argument("--questions", type=Path, required=True, help="csv or tsv with a header")
    questions.add_argument("--output", type=Path, required=True, help="folder of the parquets")
    questions.add_argument("--corpus", type=Path, help="check that the gold titles are in this corpus")
    questions.add_argument("--name", default=QuestionsOptions.name, help="of the set (%(default)s)")
    questions.add_argument("--separator", default=QuestionsOptions.separator, help="between answers (%(default)s)")
    questions.add_argument("--test_share", type=float, default=QuestionsOptions.test_share, help="(%(default)s)")
    questions.add_argument("--seed", type=int, default=QuestionsOptions.seed, help="of the division (%(default)s)")
    for command in (corpus, questions):
        command.add_argument("--on_error", choices=("raise", "skip"), default="raise", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    main()
