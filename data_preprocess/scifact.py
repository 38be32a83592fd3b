"""Turn SciFact, published as a zip of csv files, into a BEIR folder.

    python -m data_preprocess.scifact --source scifact.zip --save_dir data/scifact

Every abstract is a document. A claim is a query, and the abstracts that it cites are relevant with grade 1, as in BEIR,
whose `test` split is the validation claims; the published test claims have no labels and are left out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from verl.errors import DataError, SearchAgentError

logger = logging.getLogger(__name__)

_CORPUS = "corpus_train.csv"
_SPLITS = {"train": "claims_train.csv", "test": "claims_validation.csv"}
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NUMBERS = re.compile(r"\[[\d\s,]*\]")


def convert(source: Path, save_dir: Path) -> dict[str, int]:
    """Write `corpus.jsonl`, `queries.jsonl` and `qrels/{train,test}.tsv`; the folder appears only when complete.

    Returns:
        the number of documents, and of claims by split.

    Raises:
        DataError: `source` is not this data set, or `save_dir` exists and is not empty.
    """
    if save_dir.exists() and any(save_dir.iterdir()):
        raise DataError(f"{save_dir} is not empty; pass a new folder")
    try:
        with zipfile.ZipFile(source) as archive:
            documents = dict(_documents(archive))
            claims = {split: _claims(archive, name, documents) for split, name in _SPLITS.items()}
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{source} cannot be read ({error}); expected the zip of SciFact's csv files") from error
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_dir.parent, prefix=f".{save_dir.name}-") as folder:
        _write(Path(folder) / "beir", documents, claims)
        os.replace(Path(folder) / "beir", save_dir)
    return {"documents": len(documents), **{split: len(found) for split, found in claims.items()}}


def sentences(abstract: str) -> list[str]:
    """Read the printed form of an array of strings, which has no commas: a literal parser would glue its sentences.

    Raises:
        ValueError: something besides quoted strings in square brackets.
    """
    rest = _STRING.sub("", abstract)
    if not (rest.startswith("[") and rest.endswith("]") and not rest[1:-1].strip()):
        raise ValueError(f"abstract {abstract[:60]!r}; expected quoted sentences in square brackets")
    return [ast.literal_eval(string) for string in _STRING.findall(abstract)]


def _documents(archive: zipfile.ZipFile) -> Iterator[tuple[str, tuple[str, str]]]:
    for number, row in _rows(archive, _CORPUS):
        try:
            yield row["doc_id"], (row["title"].strip(), " ".join(map(str.strip, sentences(row["abstract"]))))
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{_CORPUS}, row {number}: {error}") from error


def _claims(
    archive: zipfile.ZipFile, name: str, documents: dict[str, tuple[str, str]]
) -> dict[str, tuple[str, list[str]]]:
    """Return text and cited documents of every claim; a claim has a row for each piece of its evidence."""
    claims: dict[str, tuple[str, list[str]]] = {}
    for number, row in _rows(archive, name):
        listed = row["cited_doc_ids"]
        if not _NUMBERS.fullmatch(listed):
            raise DataError(f"{name}, row {number}: cited_doc_ids={listed!r}; expected a list of integers")
        text, cited = claims.setdefault(row["id"], (row["claim"].strip(), []))
        if text != row["claim"].strip():
            raise DataError(f"{name}, row {number}: claim {row['id']} has another text than in a row before")
        for document in re.findall(r"\d+", listed):
            if document not in documents:
                raise DataError(f"{name}, row {number}: document {document} is not in {_CORPUS}")
            if document not in cited:
                cited.append(document)
    return claims


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    with archive.open(name) as raw:
        yield from enumerate(csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline="")), start=1)


def _write(
    folder: Path, documents: dict[str, tuple[str, str]], claims: dict[str, dict[str, tuple[str, list[str]]]]
) -> None:
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for id, (title, text) in documents.items():
            file.write(json.dumps({"_id": id, "title": title, "text": text}, ensure_ascii=False) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for found in claims.values():
            for id, (claim, _) in found.items():
                file.write(json.dumps({"_id": id, "text": claim}, ensure_ascii=False) + "\n")
    for split, found in claims.items():
        with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"{id}\t{document}\t1\n" for id, (_, cited) in found.items() for document in cited)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_preprocess.scifact", description="SciFact as a BEIR folder.")
    parser.add_argument("--source", required=True, help="zip of corpus_train.csv and claims_*.csv")
    parser.add_argument("--save_dir", required=True, help="the BEIR folder to write")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        counts = convert(Path(args.source), Path(args.save_dir))
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    logger.info("wrote %s: %s", args.save_dir, ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
