"""Relevance judgements (qrels) and runs, in the files that trec_eval and BEIR read.

A run maps query to document to score, and the order that counts is that of the scores. trec_eval keeps them as 32-bit
floats and puts the greater document id first where they are equal, so `ranking` gives every document its own score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from verl.errors import DataError
from verl.retrieval.corpus_formats import text_lines

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]


def ranking(ids: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Return the scores of one query's documents, lowered by the least there is where they would not fall.

    Args:
        ids: documents, best first; where one comes twice, its first place counts.
        scores: (len(ids),) floats

    Returns:
        strictly falling scores that 32-bit floats hold exactly, so that every evaluator keeps the order of `ids`.
    """
    ranked: dict[str, float] = {}
    above = np.float32(np.inf)
    for id, score in zip(ids, scores, strict=True):
        if id not in ranked:
            above = min(np.float32(score), np.nextafter(above, np.float32(-np.inf)))
            ranked[id] = float(above)
    return ranked


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read judgements: TREC's four columns (query, iteration, document, grade) or BEIR's three, with a header.

    Raises:
        DataError: a malformed line, or two grades for one document; names file and line.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in text_lines(path):
        fields = _qrels_fields(line)
        if fields is None:
            raise DataError(
                f"{path}, line {number}: {line[:80]!r}; expected query, iteration, document and grade, or query, "
                "document and grade with tabs between them"
            )
        query, document, grade = fields
        if not grade.lstrip("+-").isdecimal():
            if not qrels and number == 1:
                continue
            raise DataError(f"{path}, line {number}: grade {grade!r}; expected an integer")
        known = qrels.setdefault(query, {}).setdefault(document, int(grade))
        if known != int(grade):
            raise DataError(
                f"{path}, line {number}: document {document!r} of query {query!r} has grade {grade} here and {known} "
                "before; expected one grade"
            )
    if not qrels:
        raise DataError(f"{path} holds no judgement; expected one per line")
    return qrels


def _qrels_fields(line: str) -> tuple[str, str, str] | None:
    for fields in (line.split("\t"), line.split()):
        fields = [field.strip() for field in fields]
        if len(fields) in (3, 4) and all(fields):
            return fields[0], fields[-2], fields[-1]
    return None


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Read a run of six columns: query, Q0, document, rank, score, tag. The ranks are not looked at, as in trec_eval.

    Raises:
        DataError: a malformed line, a score that is no finite number, or a document twice; names file and line.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in text_lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns; expected six: query, Q0, document, rank, score, tag"
            )
        query, _, document, _, value, _ = fields
        score = _number(value)
        if not math.isfinite(score):
            raise DataError(f"{path}, line {number}: score {value!r}; expected a finite number")
        documents = run.setdefault(query, {})
        if document in documents:
            raise DataError(f"{path}, line {number}: document {document!r} comes twice for query {query!r}")
        documents[document] = score
    if not run:
        raise DataError(f"{path} holds no result; expected one document per line")
    return run


def write_run(path: Path, run: Run, tag: str) -> None:
    """Write a run, the documents of each query by falling score.

    Raises:
        DataError: an id holds white space, which separates the columns of the file.
    """
    with path.open("w", encoding="utf-8") as file:
        for query, scores in run.items():
            ordered = sorted(scores, key=scores.__getitem__, reverse=True)
            for word in (query, tag, *ordered):
                if not word or len(word.split()) != 1 or word.split()[0] != word:
                    raise DataError(f"{path}: {word!r} is empty or holds white space, which a TREC run cannot hold")
            for rank, document in enumerate(ordered, start=1):
                file.write(f"{query} Q0 {document} {rank} {np.float32(scores[document])!s} {tag}\n")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
