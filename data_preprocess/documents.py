"""A folder of documents as titled texts: txt, Markdown, HTML, and tables (jsonl, csv, tsv) with a document a row.

A document's title is, for Markdown the `title` of its front matter or else its first level-1 heading, for HTML its
`<title>`, for a row its title column, and otherwise the file's name without its ending.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from verl.errors import DataError

PLAIN = (".txt",)
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm")
TABLES = (".jsonl", ".csv", ".tsv")
ENDINGS = (*PLAIN, *MARKDOWN, *HTML, *TABLES)

_FENCE = re.compile(r"^\s*(```|~~~).*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:\s*[\"']?(.*?)[\"']?\s*$", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)
_FIRST_HEADING = re.compile(r"^#\s+(.*?)\s*#*\s*$", re.MULTILINE)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure"}
    | {"footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre"}
    | {"section", "table", "td", "th", "tr", "ul"}
)
_HIDDEN = frozenset({"script", "style", "template", "noscript"})


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        id: names a row; rows are numbered from 1 where it is missing.
    """

    text: str = "text"
    title: str = "title"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class SourceText:
    """One document as it lies in the folder.

    Attributes:
        name: the path within the folder, and the row in a table; unique.
        fault: why it cannot be used; then there is no text.
    """

    name: str
    title: str = ""
    text: str = ""
    fault: str = ""


def read_documents(folder: Path, columns: Columns) -> Iterator[SourceText]:
    """Yield the documents of all files with a known ending in a folder and its folders, by name; or those of one file.

    Raises:
        DataError: nothing there, or no file with a known ending.
    """
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if _counts(path, folder))
    if not files or files[0].suffix.lower() not in ENDINGS:
        raise DataError(f"{folder} holds no document; expected files that end in {', '.join(ENDINGS)}")
    root = folder.parent if folder.is_file() else folder
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as cause:
            yield SourceText(name, fault=f"cannot be read as UTF-8 ({cause})")
            continue
        yield from _documents(name, path.suffix.lower(), text, columns)


def _counts(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in ENDINGS and path.is_file() and not hidden


def _documents(name: str, ending: str, text: str, columns: Columns) -> Iterator[SourceText]:
    stem = Path(name).stem.replace("_", " ")
    if ending in TABLES:
        yield from _table_rows(name, ending, text, columns, stem)
        return
    if ending in MARKDOWN:
        title, text = _from_markdown(text)
    elif ending in HTML:
        title, text = _from_html(text)
    else:
        title = ""
    yield _checked(name, title or stem, text)


def _checked(name: str, title: str, text: str) -> SourceText:
    if not text.strip():
        return SourceText(name, fault="holds no text")
    try:
        f"{title}{text}".encode()
    except UnicodeEncodeError:
        return SourceText(name, fault="holds an unpaired surrogate (\\ud800 to \\udfff), which is no character")
    return SourceText(name, " ".join(title.split()), text)


def _from_markdown(text: str) -> tuple[str, str]:
    """Return title and text: without front matter, fences, images and the marks of headings and links."""
    text = text.replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    stated = _FRONT_TITLE.search(front[0]) if front else None
    text = text[front.end() :] if front else text
    heading = _FIRST_HEADING.search(text)
    if heading:
        text = text[: heading.start()] + text[heading.end() :]
    text = _HEADING.sub(r"\n\1\n", _FENCE.sub("", text))
    text = _LINK.sub(r"\1", _IMAGE.sub("", text))
    title = stated[1] if stated else (_LINK.sub(r"\1", heading[1]) if heading else "")
    return title, text


def _from_html(text: str) -> tuple[str, str]:
    parser = _Page()
    parser.feed(text)
    parser.close()
    return " ".join("".join(parser.title).split()), "".join(parser.parts)


class _Page(HTMLParser):
    """Gathers what a page shows; a block is a paragraph."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title: list[str] = []
        self.parts: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN or tag == "title":
            self._open.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open = self._open[: self._open.index(tag)]
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "title":
            self.title.append(data)
        elif not self._open:
            self.parts.append(data)


def _table_rows(name: str, ending: str, text: str, columns: Columns, stem: str) -> Iterator[SourceText]:
    rows = _json_rows(text) if ending == ".jsonl" else csv_rows(text, ending)
    ids: set[str] = set()
    for number, (line, row) in enumerate(rows, start=1):
        place = f"{name}:{line}"
        if isinstance(row, str):
            yield SourceText(place, fault=row)
            continue
        content, title, id = (row.get(column) for column in (columns.text, columns.title, columns.id))
        id = str(id) if isinstance(id, str | int) and str(id).strip() else str(number)
        if not isinstance(content, str):
            found = ", ".join(map(str, row)) or "none"
            yield SourceText(place, fault=f"no column {columns.text!r} (found {found}); say which with --text_column")
        elif id in ids:
            yield SourceText(place, fault=f"{columns.id} {id!r} occurs twice in the file; make ids unique")
        else:
            yield _checked(f"{name}:{id}", title if isinstance(title, str) and title.strip() else stem, content)
        ids.add(id)


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as cause:
            yield number, f"not JSON ({cause})"
            continue
        yield number, row if isinstance(row, dict) else "no JSON object"


def csv_rows(text: str, ending: str) -> Iterator[tuple[int, Mapping[str, str] | str]]:
    """Yield the rows of a csv or tsv with a header, or what is wrong with one, each with the line where it ends.

    Cells that the header does not name are a fault: they mean that a comma or a quotation mark is out of place.
    """
    csv.field_size_limit(sys.maxsize)  # its usual bound, 128 kB, is less than a long document
    stream = io.StringIO(text, newline="")
    reader = csv.DictReader(stream, delimiter="\t" if ending == ".tsv" else ",", strict=True)
    try:
        header = [name.strip().lower() for name in reader.fieldnames or ()]
    except csv.Error as cause:
        yield 1, f"the header is malformed ({cause}); put names with commas or quotation marks in quotes"
        return
    if len(set(header)) < len(header):
        yield 1, f"the header names a column twice ({', '.join(header)}); give each a name of its own"
        return
    reader.fieldnames = header
    while True:
        try:
            row = next(reader, None)
        except csv.Error as cause:
            # Lines count once they are read to their end, which this one was not.
            yield reader.line_num + 1, f"malformed ({cause}); put texts with commas or quotation marks in quotes"
            return
        if row is None:
            return
        if None in row:
            yield reader.line_num, f"{len(header)} columns in the header, {len(header) + len(row[None])} in the row"
        else:
            yield reader.line_num, {name: value or "" for name, value in row.items()}
