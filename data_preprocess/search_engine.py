"""Turn DeepRetrieval's literature and evidence questions into question parquets.

    python -m data_preprocess.search_engine --dataset pubmed --source raw_data/pubmed --save_dir data/pubmed

The source is a folder with `train`, `dev` (or `val`) and `test` (or `test_full`, or both) as `.jsonl` or `.parquet`:

- PubMed and CTGov, raw: `pico` {P, I, C, O}, `publication_pmids` or `trial_nctids`, `pub_date`, `origin` {pmid};
- NQ, TriviaQA and SQuAD, raw: `question`, `answers`;
- the published parquets of all of them: `data_source`, `input`, `label`, `pub_date`. Their prompts are templated, so
  the fields are taken instead.

A literature question's text is its four `P:` to `O:` lines, its answers are the target ids, and `extra.pub_date` is the
date up to which publications count. Test questions all stay; validation comes from `dev`, or from train where there is
none, never from test as published; train keeps nothing that is in either.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_preprocess.disjoint import Separated, separate, wording
from data_preprocess.pubdate import normalise_date
from data_preprocess.readers.base import Row, answers_of, shown, text_of
from data_preprocess.readers.files import read_file
from data_preprocess.splits import check_new, write_splits
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.errors import DataError, SearchAgentError
from verl.types import Question

logger = logging.getLogger(__name__)

VALIDATION = 200
SEED = 42
"""The published seed of train's order."""

_FILES = {"train": ("train",), "validation": ("dev", "val", "validation"), "test": ("test", "test_full")}
_PICO = ("P", "I", "C", "O")
_REVIEW = "review"


@dataclass(frozen=True, slots=True)
class DataSet:
    """One published set.

    Attributes:
        task: which instruction its prompts have.
        targets: field of the target ids in the raw files; empty for evidence questions.
        id: what a target id looks like.
        sources: what `data_source` in published files begins with.
    """

    task: Literal["literature", "query"]
    targets: str = ""
    id: str = ""
    sources: tuple[str, ...] = ()


DATASETS = {
    "pubmed": DataSet("literature", "publication_pmids", r"[1-9]\d*", ("pubmed", "pmd")),
    "ctgov": DataSet("literature", "trial_nctids", r"NCT\d{8}", ("ctgov",)),
    "nq_serini": DataSet("query", sources=("nq_serini",)),
    "triviaqa": DataSet("query", sources=("triviaqa",)),
    "squad": DataSet("query", sources=("squad",)),
}


def convert(name: str, source: Path, save_dir: Path, validation: int = VALIDATION, seed: int = SEED) -> Separated:
    """Write `{train,validation,test}.parquet`; the folder appears only when complete.

    Args:
        name: a key of `DATASETS`.
        validation: most validation questions.

    Raises:
        DataError: a file is missing, a row cannot be read (names it), nothing is left of a split, or `save_dir` is not
            empty.
    """
    check_new(save_dir)
    read = {split: [q for path in _paths(source, split) for q in read_rows(name, path)] for split in _FILES}
    separated = separate(read, validation, seed, keys)
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task=DATASETS[name].task))
    write_splits(save_dir, separated.splits, lambda question: grammar.prompt_messages(question)[0]["content"])
    return separated


def keys(question: Question) -> tuple[str, ...]:
    """Return what questions of two splits must not share: the wording, or the review that they come from."""
    review = question.extra.get(_REVIEW)
    return (*wording(question), *((f"review:{review}",) if review else ()))


def read_rows(name: str, path: Path) -> list[Question]:
    """Read the questions of one file, raw or published; one without any target is left out and counted.

    Raises:
        DataError: the file or a row cannot be read; says where and what was expected.
    """
    questions: list[Question] = []
    without: Counter[str] = Counter()
    number = -1
    for number, located in enumerate(read_file(path)):
        if located.row is None:
            raise DataError(f"{located.place}: {located.reason}")
        try:
            question = _question(name, located.row, f"{path.stem}/{number}")
        except ValueError as cause:
            raise DataError(f"{located.place}: {cause}") from cause
        if not question.answers:
            without["target"] += 1
            continue
        if DATASETS[name].targets and "pub_date" not in question.extra:
            without["publication date, so nothing limits their search"] += 1
        questions.append(question)
    for what, count in without.items():
        logger.warning("%s: %d of %d rows are without a %s", path, count, number + 1, what)
    return questions


def _question(name: str, row: Row, place: str) -> Question:
    """Read one row; ValueError with the reason if it cannot be."""
    dataset, source = DATASETS[name], name
    if "data_source" in row:
        source = text_of(row, "data_source")
        if not source.startswith(dataset.sources):
            raise ValueError(f"data_source is {source!r}; expected {' or '.join(dataset.sources)}, for {name}")
        text, found = row.get("input"), _label(row)
    else:
        text = row.get("pico") if dataset.targets else text_of(row, "question")
        found = row.get(dataset.targets or "answers")
    text = _pico(text) if dataset.targets else text_of({"input": text}, "input")
    answers = _ids(found, dataset) if dataset.targets else _answers(found)
    return Question(f"{source}/{place}", text, answers, source, extra=_extra(row) if dataset.targets else {})


def _label(row: Row) -> Any:
    """Return the targets of a published row."""
    if row.get("label") is not None:
        return row["label"]
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    return truth.get("target") if isinstance(truth, Mapping) else None


def _pico(value: Any) -> str:
    """Return the four lines; a published text has them already."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, Mapping) or not any(str(value.get(part) or "").strip() for part in _PICO):
        raise ValueError(f"the research question is {shown(value)}; expected its P, I, C and O")
    return "\n".join(f"{part}: {' '.join(str(value.get(part) or '').split())}".strip() for part in _PICO)


def _answers(found: Any) -> tuple[str, ...]:
    if isinstance(found, list | tuple) and not any(isinstance(answer, str) and answer.strip() for answer in found):
        return ()
    return answers_of(found, "answers")


def _ids(found: Any, dataset: DataSet) -> tuple[str, ...]:
    found = found.tolist() if hasattr(found, "tolist") else found
    listed = [found] if isinstance(found, str | int) else found
    if listed is None:
        return ()
    if not isinstance(listed, list | tuple):
        raise ValueError(f"the targets are {shown(found)}; expected a list of ids")
    ids = tuple(dict.fromkeys(str(id).strip().upper() for id in listed if str(id).strip()))
    wrong = next((id for id in ids if not re.fullmatch(dataset.id, id)), None)
    if wrong is not None:
        raise ValueError(f"the target {shown(wrong)} is no id of this set; expected one like {dataset.id}")
    return ids


def _extra(row: Row) -> dict[str, str]:
    extra = {}
    date = row.get("pub_date")
    if date is not None and str(date).strip():
        extra["pub_date"] = normalise_date(str(date))
    origin = row.get("origin")
    review = origin.get("pmid") if isinstance(origin, Mapping) else None
    if review is not None and str(review).strip():
        extra[_REVIEW] = str(review).strip()
    return extra


def _paths(source: Path, split: str) -> Iterator[Path]:
    """Yield the files of a split; of one name, the published parquet goes before the raw file."""
    found = False
    for stem in _FILES[split]:
        path = next((path for end in ("parquet", "jsonl") if (path := source / f"{stem}.{end}").is_file()), None)
        if path is not None:
            found = True
            yield path
    if not found and split != "validation":
        names = " or ".join(f"{stem}.jsonl" for stem in _FILES[split])
        raise DataError(f"{source} has no {names}, nor as .parquet; expected the folder of a published set")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.search_engine", description="DeepRetrieval's questions as question parquets."
    )
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--source", required=True, help="folder with train, dev or val, and test")
    parser.add_argument("--save_dir", required=True, help="folder to write")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="most validation questions")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw of validation and of train's order")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.validation < 1:
        parser.error(f"--validation {args.validation}: expected at least 1")
    try:
        made = convert(args.dataset, Path(args.source), Path(args.save_dir), args.validation, args.seed)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    for why, count in made.dropped.items():
        logger.info("left out %d %s", count, why)
    logger.info("wrote %s: %s", args.save_dir, ", ".join(f"{len(q)} {split}" for split, q in made.splits.items()))


if __name__ == "__main__":
    main()
