"""Test collections: queries, and which documents answer them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from verl.errors import DataError
from verl.retrieval.corpus_formats import text_lines
from verl.retrieval.trec import Qrels, read_qrels


@dataclass(frozen=True, slots=True)
class Collection:
    """The judged queries of a test collection.

    Attributes:
        name: for reports.
        queries: text by id; empty where only a finished run is to be scored.
        qrels: grade by document, by query; above 0 is relevant.
    """

    name: str
    queries: Mapping[str, str]
    qrels: Qrels


def open_beir(folder: Path, split: str | None = None) -> Collection:
    """Open a BEIR folder: `queries.jsonl` (or `.gz`) and `qrels/*.tsv`.

    Args:
        split: name of a file in `qrels`; `test` when None, or the only one there.

    Raises:
        DataError: a missing or malformed file, or a judged query without a text.
    """
    found = sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))
    chosen = split or (found[0] if len(found) == 1 else "test")
    if chosen not in found:
        raise DataError(f"{folder}: no qrels/{chosen}.tsv (found {', '.join(found) or 'none'}); pass one with --split")
    names = ("queries.jsonl", "queries.jsonl.gz")
    queries = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    return open_files(queries, folder / "qrels" / f"{chosen}.tsv", f"{folder.resolve().name}/{chosen}")


def open_files(queries: Path | None, qrels: Path, name: str | None = None) -> Collection:
    """Open judgements and the queries that they judge; queries without judgement are left out.

    Args:
        queries: jsonl with `_id` (or `id`) and `text`, or a tsv of id and text; None for none.

    Raises:
        DataError: a missing or malformed file, or a judged query without a text.
    """
    judged = read_qrels(qrels)
    if queries is None:
        return Collection(name or qrels.name, {}, judged)
    texts = read_queries(queries)
    missing = [query for query in judged if query not in texts]
    if missing:
        raise DataError(
            f"{qrels} judges {len(missing)} queries that {queries} does not hold, the first is {missing[0]!r}; pass "
            "the queries that belong to these judgements"
        )
    return Collection(name or qrels.name, {query: texts[query] for query in judged}, judged)


def read_queries(path: Path) -> dict[str, str]:
    """Read queries: jsonl with `_id` (or `id`) and `text`, or a tsv of id and text.

    Raises:
        DataError: a malformed line, a blank query or an id that comes twice; names file and line.
    """
    queries: dict[str, str] = {}
    for number, line in text_lines(path):
        try:
            id, text = _json_query(line) if line.lstrip().startswith("{") else _tsv_query(line)
            if not id or not text:
                raise ValueError(f"query {id!r} has the text {text!r}; expected an id and a text that are not blank")
            if id in queries:
                raise ValueError(f"id {id!r} comes twice; ids must be unique")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        queries[id] = text
    return queries


def _json_query(line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); expected one JSON object per line") from error
    id, text = row.get("_id", row.get("id")), row.get("text")
    if isinstance(id, bool) or not isinstance(id, str | int) or not isinstance(text, str):
        found = ", ".join(sorted(row))
        raise ValueError(f"found {found or 'no key'}; expected _id (a string or an integer) and text (a string)")
    return str(id).strip(), text.strip()


def _tsv_query(line: str) -> tuple[str, str]:
    id, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("no tab; expected the id, a tab and the text of a query")
    return id.strip(), text.strip()
