"""Turn retrieval collections into DeepRetrieval's question parquets: BEIR sets and MS MARCO's domains.

    python -m data_preprocess.ir --dataset scifact --source beir/scifact --save_dir data/deepretrieval/scifact
    python -m data_preprocess.ir --dataset msmarco --domain health --source raw/health --save_dir data/msmarco_health

The source is one of:

- a BEIR folder: `queries.jsonl` and `qrels/{train,dev,test}.tsv`, with or without a header; `dev` may be missing;
- MS MARCO of one domain: `train.jsonl` and `dev.jsonl` (the test questions, as published) with `question`, `docs_id`;
- the published parquets of either, `{train,val,test}.parquet`: `data_source`, `qid`, `query` (or `input`), `target`
  (or `label`) and `score`. Their prompts are templated, so the fields are taken instead.

A question's answers are the ids of its relevant documents; where their grades differ, `extra.grades` has them all, as
`verl.rewards.ndcg` reads them. A question of several relevant documents is one row: published SciFact rows, one for
each document, are put together again. `data_source` is `SET_SPLIT`, or with `--dense` `SET_dense_SPLIT`, for which the
prompt is that of a dense retriever (MS MARCO's: `msmarco_sparse_SPLIT` and `msmarco_dense_SPLIT`). Test questions all
stay; validation comes from `dev`, or from train where there is none, never from test as published; train keeps nothing
that is in either.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_preprocess.disjoint import Separated, separate, wording
from data_preprocess.readers.base import Row, shown, text_of
from data_preprocess.readers.files import read_file
from data_preprocess.search_engine import SEED, VALIDATION
from data_preprocess.splits import check_new, write_splits
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.errors import DataError, SearchAgentError
from verl.retrieval.collection import read_queries
from verl.retrieval.trec import read_qrels
from verl.rewards.ndcg import GRADES
from verl.types import Question

logger = logging.getLogger(__name__)

BEIR = ("scifact", "nfcorpus", "fever", "hotpotqa", "fiqa", "msmarco_beir")
MSMARCO = "msmarco"
DOMAINS = ("all", "health", "science", "tech")

_QRELS = {"train": ("train",), "validation": ("dev",), "test": ("test",)}
_DOMAIN_FILES = {"train": ("train",), "validation": (), "test": ("dev",)}
_PUBLISHED = {"train": ("train",), "validation": ("val",), "test": ("test",)}
_NAMES = {"train": "train", "validation": "val", "test": "test"}
_QUERY_ID = "qid"


@dataclass(frozen=True, slots=True)
class IrSet:
    """One question set.

    Attributes:
        name: of `BEIR`, or `MSMARCO`.
        dense: for a dense retriever.
        domain: of MS MARCO, else empty.
    """

    name: str
    dense: bool = False
    domain: str = ""

    def __post_init__(self) -> None:
        if self.name not in (*BEIR, MSMARCO):
            raise DataError(f"dataset {self.name!r}; expected one of {', '.join((*BEIR, MSMARCO))}")
        if self.domain and (self.name != MSMARCO or self.domain not in DOMAINS):
            raise DataError(
                f"domain {self.domain!r} of {self.name}; expected one of {', '.join(DOMAINS)}, of {MSMARCO}"
            )

    @property
    def stem(self) -> str:
        """What `data_source` begins with."""
        if self.name == MSMARCO:
            return f"{MSMARCO}_{'dense' if self.dense else 'sparse'}"
        return f"{self.name}_dense" if self.dense else self.name


def convert(made_of: IrSet, source: Path, save_dir: Path, validation: int = VALIDATION, seed: int = SEED) -> Separated:
    """Write `{train,validation,test}.parquet`; the folder appears only when complete.

    Args:
        validation: most validation questions.

    Raises:
        DataError: a file is missing, a row cannot be read (names it), nothing is left of a split, or `save_dir` is not
            empty.
    """
    check_new(save_dir)
    separated = separate(read_splits(made_of, source), validation, seed, keys)
    named = {split: _named(made_of, split, questions) for split, questions in separated.splits.items()}
    grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task="dense" if made_of.dense else "query"))
    write_splits(save_dir, named, lambda question: grammar.prompt_messages(question)[0]["content"])
    return replace(separated, splits=named)


def keys(question: Question) -> tuple[str, ...]:
    """Return what questions of two splits must not share: the wording, or the set's own id."""
    own = question.extra.get(_QUERY_ID)
    return (*wording(question), *((f"{_QUERY_ID}:{own}",) if own else ()))


def read_splits(made_of: IrSet, source: Path) -> dict[str, list[Question]]:
    """Read the questions of a source of any of the three kinds by split, as they are there.

    Raises:
        DataError: as for `convert`.
    """
    if (source / "qrels").is_dir():
        return _read_beir(made_of, source)
    if any(source.glob("*.parquet")):
        kinds, suffix = _PUBLISHED, "parquet"
    elif made_of.name == MSMARCO:
        kinds, suffix = _DOMAIN_FILES, "jsonl"
    else:
        raise DataError(f"{source} has neither qrels/ nor published parquets; expected the folder of {made_of.name}")
    read = {}
    for split, stems in kinds.items():
        paths = [source / f"{stem}.{suffix}" for stem in stems]
        if split == "validation":
            paths = [path for path in paths if path.is_file()]
        read[split] = [question for path in paths for question in read_rows(made_of, path)]
    return read


def _read_beir(made_of: IrSet, source: Path) -> dict[str, list[Question]]:
    names = ("queries.jsonl", "queries.jsonl.gz")
    path = next((source / name for name in names if (source / name).is_file()), source / names[0])
    queries = read_queries(path)
    read: dict[str, list[Question]] = {}
    for split, stems in _QRELS.items():
        found = [source / "qrels" / f"{stem}.tsv" for stem in stems]
        found = [path for path in found if split != "validation" or path.is_file()]
        read[split] = [question for qrels in found for question in _judged(made_of, queries, path, qrels)]
    return read


def _judged(made_of: IrSet, queries: Mapping[str, str], path: Path, qrels: Path) -> list[Question]:
    judged = read_qrels(qrels)
    missing = [id for id in judged if id not in queries]
    if missing:
        raise DataError(
            f"{qrels} judges {len(missing)} queries that {path} does not hold, the first is {missing[0]!r}; pass the "
            "queries that belong to these judgements"
        )
    made = [_question(made_of, f"{qrels.stem}/{id}", queries[id], grades, id) for id, grades in judged.items()]
    return _with_answers(made, qrels)


def read_rows(made_of: IrSet, path: Path) -> list[Question]:
    """Read the questions of one file, raw MS MARCO or published; rows of one query are put together.

    Raises:
        DataError: the file or a row cannot be read; says where and what was expected.
    """
    grades: dict[tuple[str, str], dict[str, int]] = {}
    for located in read_file(path):
        if located.row is None:
            raise DataError(f"{located.place}: {located.reason}")
        try:
            query, judged = _read_row(made_of, located.row)
            known = grades.setdefault(query, {})
            for document, grade in judged.items():
                if known.setdefault(document, grade) != grade:
                    raise ValueError(f"document {document!r} has grade {grade} here and {known[document]} before")
        except ValueError as cause:
            raise DataError(f"{located.place}: {cause}") from cause
    made = [
        _question(made_of, f"{path.stem}/{number}", text, judged, id)
        for number, ((id, text), judged) in enumerate(grades.items())
    ]
    return _with_answers(made, path)


def _read_row(made_of: IrSet, row: Row) -> tuple[tuple[str, str], dict[str, int]]:
    """Return id (may be empty) and text of a query, and its judgements; ValueError with the reason if it cannot be."""
    if "data_source" not in row:
        return ("", text_of(row, "question")), _grades(row.get("docs_id"), None)
    source = text_of(row, "data_source")
    if not re.fullmatch(rf"{made_of.stem}(_no_reason)?_(train|val|test)(_no_reason)?", source):
        raise ValueError(f"data_source is {source!r}; expected {made_of.stem}_train, {made_of.stem}_val or ..._test")
    truth = row.get("reward_model")
    truth = truth.get("ground_truth") if isinstance(truth, Mapping) else None
    truth = truth if isinstance(truth, Mapping) else {}
    target = _first(row.get("target"), row.get("label"), truth.get("target"))
    id = row.get(_QUERY_ID)
    text = text_of({"query": _first(row.get("query"), row.get("input"))}, "query")
    return ("" if id is None else str(id).strip(), text), _grades(target, _first(row.get("score"), truth.get("score")))


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _grades(targets: Any, scores: Any) -> dict[str, int]:
    """Return grade by document of targets and scores that are lists, or one of each; without scores all are 1."""
    ids = [_text_id(target) for target in _several(targets)]
    graded = [1] * len(ids) if scores is None else _several(scores)
    if len(graded) != len(ids):
        raise ValueError(f"{len(ids)} targets have {len(graded)} scores; expected one for each")
    judged: dict[str, int] = {}
    for id, score in zip(ids, graded, strict=True):
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float | str)
            or not re.fullmatch(r"[+-]?\d+(\.0*)?", str(score).strip())
        ):
            raise ValueError(f"target {id!r} has the score {shown(score)}; expected a whole number")
        judged.setdefault(id, int(float(score)))
    return judged


def _several(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _text_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"a target is {shown(value)}; expected the id of a document")
    return str(value).strip()


def _question(made_of: IrSet, place: str, text: str, grades: Mapping[str, int], id: str) -> Question:
    relevant = tuple(document for document, grade in grades.items() if grade > 0)
    extra = {_QUERY_ID: id} if id else {}
    if any(grade != 1 for grade in grades.values()):
        extra[GRADES] = json.dumps(grades)
    return Question(f"{made_of.stem}/{place}", text, relevant, made_of.stem, kind=made_of.domain, extra=extra)


def _with_answers(questions: Sequence[Question], place: Path) -> list[Question]:
    """Leave out what has no relevant document, and say how much that is."""
    kept = [question for question in questions if question.answers]
    if len(kept) < len(questions):
        without = len(questions) - len(kept)
        logger.warning("%s: %d of %d queries have no relevant document; left out", place, without, len(questions))
    return kept


def _named(made_of: IrSet, split: str, questions: Sequence[Question]) -> tuple[Question, ...]:
    """Return the questions under the published name of their split."""
    source = f"{made_of.stem}_{_NAMES[split]}"
    return tuple(replace(q, id=f"{source}/{q.id.partition('/')[2]}", source=source) for q in questions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.ir", description="Retrieval collections as DeepRetrieval's question parquets."
    )
    parser.add_argument("--dataset", required=True, choices=(*BEIR, MSMARCO))
    parser.add_argument("--source", required=True, help="BEIR folder, folder of one MS MARCO domain, or of parquets")
    parser.add_argument("--save_dir", required=True, help="folder to write")
    parser.add_argument("--dense", action="store_true", help="for a dense retriever")
    parser.add_argument("--domain", default="", choices=("", *DOMAINS), help="of MS MARCO; kept as the questions' kind")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="most validation questions")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw of validation and of train's order")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.validation < 1:
        parser.error(f"--validation {args.validation}: expected at least 1")
    try:
        made_of = IrSet(args.dataset, args.dense, args.domain)
        made = convert(made_of, Path(args.source), Path(args.save_dir), args.validation, args.seed)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    for why, count in made.dropped.items():
        logger.info("left out %d %s", count, why)
    logger.info("wrote %s: %s", args.save_dir, ", ".join(f"{len(q)} {split}" for split, q in made.splits.items()))


if __name__ == "__main__":
    main()
