"""Questions as parquet rows in the published s3 / Search-R1 column layout.

Columns written: `data_source`, `prompt` [{role, content}], `ability`, `reward_model` {style, ground_truth {question,
target, gt_docs {title}}}, `extra_info` {split, index}, `id`, `question`, `golden_answers`, `metadata` {kind},
`initial_searched_results` [{id, title, text}] and, ours, `baseline` {documents, answer, correct} and `extra`, a map.

What the published files leave open is decided here, once:

* `initial_searched_results` is written as structs, so that ids survive and nothing is re-parsed; a published rendered
  string (`Doc 1 (Title: ...) ...`) is still read, its documents then get ids of the form `"{question id}#1"`.
* `id` must be unique over all sources. A published id without a slash (`"train_17"` occurs in every source) is read
  as `"{source}/train_17"`, a missing one as `"{source}/{split}/{index}"`.
* `target` may be a string, a list or an array; without it `golden_answers` count.
* Columns that are not listed are ignored.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.errors import DataError
from verl.types import Baseline, Document, Question

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
_ROWS_PER_GROUP = 4096
_HEADER = re.compile(r"^Doc (\d+) ?\(Title:[ ]?", re.MULTILINE)
_STRINGS = pa.list_(pa.string())
_DOCUMENTS = pa.list_(pa.struct({"id": pa.string(), "title": pa.string(), "text": pa.string()}))
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct(
            {
                "style": pa.string(),
                "ground_truth": pa.struct(
                    {"question": pa.string(), "target": _STRINGS, "gt_docs": pa.struct({"title": _STRINGS})}
                ),
            }
        ),
        "extra_info": pa.struct({"split": pa.string(), "index": pa.int64()}),
        "id": pa.string(),
        "question": pa.string(),
        "golden_answers": _STRINGS,
        "metadata": pa.struct({"kind": pa.string()}),
        "initial_searched_results": _DOCUMENTS,
        "baseline": pa.struct({"documents": _DOCUMENTS, "answer": pa.string(), "correct": pa.bool_()}),
        "extra": pa.map_(pa.string(), pa.string()),
    }
)


def write_questions(
    path: Path,
    questions: Iterable[Question],
    split: str,
    prompt_fn: Callable[[Question], str] | None = None,
) -> int:
    """Write questions to one parquet file, all or nothing, without holding them all in memory.

    Args:
        split: goes to `extra_info.split`; `extra_info.index` counts per source, from 0.
        prompt_fn: content of the single user message in `prompt`; the bare question if None.

    Returns:
        The number of questions written.

    Raises:
        DataError: a duplicate id, an id without its source's prefix, a blank question, or no golden answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    rows = _checked_rows(questions, split, prompt_fn or (lambda question: question.text), path)
    count = 0
    try:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            while chunk := list(itertools.islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(_table(chunk, path))
                count += len(chunk)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read all questions of a parquet file, or the first `limit`. Raises as `iter_questions`."""
    return list(itertools.islice(iter_questions(path), limit))


def iter_questions(path: Path) -> Iterator[Question]:
    """Stream the questions of a parquet file in order.

    Raises:
        DataError: the file is missing or no parquet, a row is malformed (names file, row number counted from 0, and
            what was expected), or an id occurs twice.
    """
    seen: dict[str, int] = {}
    for number, row in enumerate(_iter_rows(path)):
        try:
            question = question_from_row(row)
        except DataError as cause:
            raise DataError(f"{path}: row {number}: {cause}") from cause
        first = seen.setdefault(question.id, number)
        if first != number:
            raise DataError(f"{path}: row {number}: id {question.id!r} is also row {first}'s; make ids unique")
        yield question


def question_to_row(question: Question, split: str, index: int, prompt: str) -> dict[str, Any]:
    """Return the parquet row of one question."""
    answers = list(question.answers)
    baseline = question.baseline
    truth = {"question": question.text, "target": answers, "gt_docs": {"title": list(question.gold_titles)}}
    return {
        "data_source": question.source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index},
        "id": question.id,
        "question": question.text,
        "golden_answers": answers,
        "metadata": {"kind": question.kind},
        "initial_searched_results": [_document_row(document) for document in question.initial_documents],
        "baseline": baseline
        and {
            "documents": [_document_row(document) for document in baseline.documents],
            "answer": baseline.answer,
            "correct": baseline.correct,
        },
        "extra": list(question.extra.items()),
    }


def question_from_row(row: Row) -> Question:
    """Read one row in our own or in a published layout (see the module's text).

    Raises:
        DataError: says which column came how, and what was expected.
    """
    source = _text(row.get("data_source"), "data_source", "the name of the data set")
    truth = _struct(_struct(row.get("reward_model"), "reward_model").get("ground_truth"), "reward_model.ground_truth")
    metadata = _struct(row.get("metadata"), "metadata")
    identity = _identity(row, source)
    asked = row.get("question") if truth.get("question") is None else truth.get("question")
    target = truth.get("target")
    name = "golden_answers" if target is None else "reward_model.ground_truth.target"
    kind = metadata.get("kind") or metadata.get("type") or ""
    return Question(
        id=identity,
        text=_text(asked, "question", "the question's text"),
        answers=_answers(row.get("golden_answers") if target is None else target, name),
        source=source,
        gold_titles=_titles(truth.get("gt_docs")),
        initial_documents=_documents(row.get("initial_searched_results"), "initial_searched_results", identity),
        baseline=_baseline(row.get("baseline"), identity),
        kind=str(kind),
        extra=_extra(row.get("extra")),
    )


def _extra(value: Any) -> dict[str, str]:
    """Read a map, which pyarrow hands over as a list of pairs."""
    if value is None:
        return {}
    pairs = dict(value.items() if isinstance(value, Mapping) else value)
    if not all(isinstance(name, str) and isinstance(entry, str) for name, entry in pairs.items()):
        raise DataError(f"extra={str(value)[:120]}; expected a map of strings to strings")
    return pairs


def parse_documents(rendered: str) -> list[tuple[str, str]]:
    """Split `Doc 1 (Title: T) text` blocks, numbered from 1, into (title, text) pairs.

    A header counts only at the start of a line and with the next number, so a passage that quotes another header
    stays whole. A quoted title ends at its closing quote and parenthesis, any other at the parenthesis that balances
    the opening one, so `(2001 film)` inside a title survives.
    """
    headers: list[re.Match[str]] = []
    for match in _HEADER.finditer(rendered):
        if int(match[1]) == len(headers) + 1:
            headers.append(match)
    if not headers:
        return []
    ends = [match.start() for match in headers[1:]] + [len(rendered)]
    return [_title_and_text(rendered[match.end() : end]) for match, end in zip(headers, ends, strict=True)]


def _checked_rows(
    questions: Iterable[Question], split: str, prompt_fn: Callable[[Question], str], path: Path
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for question in questions:
        problem = _problem(question, seen)
        if problem:
            raise DataError(f"cannot write {path}: question {question.id!r} {problem}")
        seen.add(question.id)
        yield question_to_row(question, split, counts[question.source], prompt_fn(question))
        counts[question.source] += 1


def _table(rows: list[dict[str, Any]], path: Path) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError) as cause:
        raise DataError(f"cannot write {path}: {cause}; every text must be valid unicode") from cause


def _problem(question: Question, seen: set[str]) -> str:
    if question.id in seen:
        return "occurs twice; make ids unique over all sources"
    if "/" not in question.id:
        return f"has no slash in its id; expected source/split/index, for example '{question.source}/train/0'"
    if not question.source or not question.text.strip():
        return f"has source {question.source!r} and text {question.text!r}; both must be given"
    if not question.answers or not all(answer.strip() for answer in question.answers):
        return f"has the answers {question.answers!r}; expected at least one, none of them blank"
    return ""


def _iter_rows(path: Path) -> Iterator[Row]:
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file; expected a parquet file of questions")
    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name in SCHEMA.names]
            _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=known):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as cause:  # damaged pages are an OSError to Arrow
        raise DataError(f"{path} cannot be read as parquet ({cause}); write it with verl.records") from cause


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if "data_source" in names and ("reward_model" in names or {"question", "golden_answers"} <= set(names)):
        return
    raise DataError(
        f"{path} has the columns {', '.join(names)}; expected data_source and either reward_model or question with "
        "golden_answers (the s3 / Search-R1 layout)"
    )


def _identity(row: Row, source: str) -> str:
    stated = row.get("id")
    if stated is not None and str(stated).strip():
        return str(stated) if "/" in str(stated) else f"{source}/{stated}"
    info = _struct(row.get("extra_info"), "extra_info")
    split, index = info.get("split"), info.get("index")
    if index is None:
        raise DataError("id and extra_info.index are both missing; give one of them")
    return f"{source}/{split or 'unknown'}/{index}"


def _answers(value: Any, name: str) -> tuple[str, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(answer, str) for answer in value):
        raise DataError(f"{name}={value!r}; expected a string or a list of strings")
    answers = tuple(answer for answer in value if answer.strip())
    if not answers:
        raise DataError(f"{name}={value!r} holds no answer; expected at least one that is not blank")
    if len(answers) < len(value):
        logger.warning("%s=%r: dropped blank answers", name, value)
    return answers


def _titles(value: Any) -> tuple[str, ...]:
    """Gold titles from any published `gt_docs`: {title: [...]}, or a list of titles, pairs or documents."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return _titles(value.get("title"))
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    titles: dict[str, None] = {}
    for entry in value:
        title = entry.get("title") if isinstance(entry, Mapping) else entry
        title = title[0] if isinstance(title, list | tuple) and title else title
        if not isinstance(title, str):
            raise DataError(f"reward_model.ground_truth.gt_docs holds {entry!r}; expected a title")
        titles[title] = None
    return tuple(titles)


def _baseline(value: Any, identity: str) -> Baseline | None:
    if value is None:
        return None
    value = _struct(value, "baseline")
    answer, correct = value.get("answer"), value.get("correct")
    if not isinstance(answer, str) or not isinstance(correct, bool):
        raise DataError(f"baseline has answer={answer!r}, correct={correct!r}; expected a string and a bool")
    return Baseline(_documents(value.get("documents"), "baseline.documents", identity), answer, correct)


def _documents(value: Any, name: str, identity: str) -> tuple[Document, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return ()
    if isinstance(value, str):
        pairs = parse_documents(value)
        if value.strip() and not pairs:
            raise DataError(f"{name}={value[:80]!r}; expected a rendering that starts with 'Doc 1 (Title: ...)'")
        return tuple(Document(f"{identity}#{i}", title, text) for i, (title, text) in enumerate(pairs, start=1))
    if not isinstance(value, list | tuple):
        raise DataError(f"{name}={value!r}; expected a list of documents or their rendered string")
    return tuple(_document(entry, name) for entry in value)


def _document(entry: Any, name: str) -> Document:
    if isinstance(entry, Mapping) and isinstance(entry.get("document"), Mapping):
        entry = entry["document"]
    if isinstance(entry, Mapping) and entry.get("id") is not None:
        if isinstance(entry.get("text"), str):
            return Document(str(entry["id"]), entry.get("title") or "", entry["text"])
        if isinstance(entry.get("contents"), str):
            return Document.from_contents(entry["id"], entry["contents"])
    raise DataError(f"{name} holds {entry!r}; expected {{id, title, text}} or {{id, contents}}")


def _title_and_text(block: str) -> tuple[str, str]:
    line = block.partition("\n")[0]
    close = line.find('")') + 1 if line.startswith('"') else 0
    close = close or _balanced_close(line)
    title = line[:close].strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, block[close + 1 :].strip()


def _balanced_close(line: str) -> int:
    """Index of the parenthesis that closes one opened before `line`; its last one, or its end, if none balances."""
    depth = 1
    for position, character in enumerate(line):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return position
    last = line.rfind(")")
    return len(line) if last < 0 else last


def _document_row(document: Document) -> dict[str, str]:
    return {"id": document.id, "title": document.title, "text": document.text}


def _struct(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{name}={value!r} ({type(value).__name__}); expected a struct")
    return value


def _text(value: Any, name: str, meaning: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}={value!r}; expected {meaning}")
    return value
