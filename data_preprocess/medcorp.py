"""Merge the published chunks of MedCorp into one corpus, a `contents` jsonl whose first line of text is the title.

    python scripts/download.py --save_path data --what medcorp_textbooks medcorp_pubmed medcorp_wikipedia
    python -m data_preprocess.medcorp --sources data/medcorp corpus/statpearls --save_path data/medcorp.jsonl

MedCorp (Xiong et al. 2024, "Benchmarking Retrieval-Augmented Generation for Medicine") is the chunks of textbooks,
PubMed, Wikipedia and StatPearls. The first three are on the Hugging Face hub; StatPearls may not be handed on, and its
chunks are made from NCBI's archive by MedRAG's `src/data/statpearls.py`. A chunk is a JSON object on a line, with `id`,
`title` and `content`; other keys are ignored, among them `contents`, which is both on one line and not in every file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from verl.errors import DataError, SearchAgentError
from verl.retrieval.corpus import OnError
from verl.retrieval.corpus_formats import source_files, text_lines
from verl.types import Document

logger = logging.getLogger(__name__)

_KEYS = ("title", "content")


def convert(sources: Sequence[Path], save_path: Path, on_error: OnError = "raise") -> dict[str, int]:
    """Write the chunks of all sources, in the order of the sources and of their files' names; a chunk at a time.

    Args:
        sources: folders, of which every jsonl is read, those of their folders included, or files.
        save_path: appears only when complete.
        on_error: what to do about a line that is no chunk: raise, or skip it, which is counted.

    Returns:
        the number of files, of chunks written, and of lines skipped.

    Raises:
        DataError: a source without chunks, a file that two sources name, a malformed line (with file, line and
            reason), or `save_path` exists or cannot be written.
    """
    if save_path.exists():
        raise DataError(f"{save_path} exists; move it away, or pass another --save_path")
    files = [file for source in sources for file in source_files(source)]
    _check_distinct(files)
    counts = {"files": len(files), "chunks": 0, "skipped": 0}
    try:
        save_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_path.parent, prefix=f".{save_path.name}-") as folder:
            partial = Path(folder) / "corpus"
            with partial.open("w", encoding="utf-8") as out:
                for file in tqdm(files, desc="merging", unit="file", delay=2, mininterval=1):
                    for line in _lines(file, on_error, counts):
                        out.write(line)
            if not counts["chunks"]:
                raise DataError(f"{', '.join(map(str, sources))}: no chunk in {len(files)} files; fetch them again")
            os.replace(partial, save_path)
    except OSError as error:
        raise DataError(f"cannot write {save_path} ({error}); free some space or pass another --save_path") from error
    return counts


def _check_distinct(files: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file} belongs to two of the --sources; name each folder once, and none inside another")
        seen.add(file.resolve())


def _lines(file: Path, on_error: OnError, counts: dict[str, int]) -> Iterator[str]:
    for number, line in text_lines(file):
        try:
            document = chunk(line)
        except ValueError as error:
            if on_error == "raise":
                raise DataError(f"{file}, line {number}: {error}; mend it, or pass --on_error skip") from error
            counts["skipped"] += 1
            logger.warning("skipped %s, line %d: %s", file, number, error)
            continue
        counts["chunks"] += 1
        yield json.dumps({"id": document.id, "contents": document.contents}, ensure_ascii=False) + "\n"


def chunk(line: str) -> Document:
    """Read one line.

    Raises:
        ValueError: it is no chunk; the message is the reason.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); expected one JSON object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; expected an object with id, title and content")
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int) or not str(id).strip():
        raise ValueError(f"id={id!r}; expected a non-empty string or an integer")
    for key in _KEYS:
        if not isinstance(row.get(key), str):
            found = ", ".join(sorted(row)) if key not in row else f"a {type(row[key]).__name__}"
            raise ValueError(f"no text under {key!r} (found {found}); expected id, title and content")
    title, text = " ".join(row["title"].split()), row["content"].strip()
    if not title and not text:
        raise ValueError(f"chunk {id!r} is blank; expected some title or content")
    try:
        f"{id}{title}{text}".encode()
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it") from error
    return Document(str(id), title, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_preprocess.medcorp", description="MedCorp as one corpus.")
    parser.add_argument("--sources", required=True, nargs="+", type=Path, help="folders of chunk files, or such files")
    parser.add_argument("--save_path", required=True, type=Path, help="the jsonl to write")
    parser.add_argument("--on_error", choices=get_args(OnError), default="raise", help="about lines that are no chunk")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        counts = convert(args.sources, args.save_path, args.on_error)
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    logger.info("wrote %s: %s", args.save_path, ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
