"""The text of a database's schema, as BIRD's and Spider's prompts show it."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from verl.errors import DataError

logger = logging.getLogger(__name__)

SchemaSource = Literal["database", "file"]
"""The CREATE TABLE statements in the database; or a file of SQL beside it, where there is one."""

_TABLES = ("tables.json", "train_tables.json", "dev_tables.json", "test_tables.json")
_CELL_CHARS = 60


class Schemas:
    """Schemas of a set by database, each read once.

    Args:
        source: where BIRD (`database`) and Spider (`file`) have them.
        folder: of the set; its `tables.json` says what databases look like that are not there.
        sample_rows: rows of each table that are shown behind its statement.
    """

    def __init__(self, source: SchemaSource, folder: Path, sample_rows: int = 0) -> None:
        self._source = source
        self._sample_rows = sample_rows
        self._known: dict[str, str] = {}
        self._tables = {str(entry.get("db_id")): entry for name in _TABLES for entry in _entries(folder / name)}

    def of(self, db_id: str, database: Path | None) -> str:
        """Return the schema of a database; blank where nothing tells it.

        Args:
            database: its file, None if it is not there.

        Raises:
            DataError: the file is no database.
        """
        if db_id not in self._known:
            self._known[db_id] = self._read(db_id, database)
        return self._known[db_id]

    def _read(self, db_id: str, database: Path | None) -> str:
        if database is not None:
            beside = (database.with_name("schema.sql"), database.with_name(f"{db_id}.sql"))
            written = next((path for path in beside if path.is_file()), None) if self._source == "file" else None
            schema = without_inserts(written.read_text("utf-8", "replace")) if written else ""
            schema = schema or schema_of(database, self._sample_rows)
            if schema:
                return schema
        return drawn(self._tables[db_id]) if db_id in self._tables else ""


def schema_of(database: Path, sample_rows: int = 0) -> str:
    """Return the CREATE TABLE statements of a database, with rows of each table behind it if wanted.

    Raises:
        DataError: it is no database.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            connection.text_factory = lambda value: value.decode("utf-8", "replace")
            tables = connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL "
                "AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid"
            ).fetchall()
            return "\n\n".join(sql.strip() + _sample(connection, name, sample_rows) for name, sql in tables)
    except sqlite3.Error as cause:
        raise DataError(f"{database} cannot be read as a SQLite database ({cause}); fetch it again") from cause


def without_inserts(schema: str) -> str:
    """Return a file of SQL without the lines that insert, as Spider's prompts are published."""
    return "\n".join(line for line in schema.splitlines() if "insert" not in line.lower()).strip()


def drawn(entry: Mapping[str, Any]) -> str:
    """Return CREATE TABLE statements for an entry of Spider's `tables.json`."""
    tables, columns = entry["table_names_original"], entry["column_names_original"]
    types, primary = entry["column_types"], {at for key in entry["primary_keys"] for at in _flat(key)}
    statements = []
    for number, table in enumerate(tables):
        own = [at for at, (of, _) in enumerate(columns) if of == number]
        lines = [f'  "{columns[at][1]}" {types[at]}{" PRIMARY KEY" * (at in primary)}' for at in own]
        lines += [
            f'  FOREIGN KEY ("{columns[one][1]}") REFERENCES "{tables[columns[other][0]]}" ("{columns[other][1]}")'
            for one, other in entry["foreign_keys"]
            if one in own
        ]
        statements.append(f'CREATE TABLE "{table}" (\n' + ",\n".join(lines) + "\n)")
    return "\n\n".join(statements)


def _sample(connection: sqlite3.Connection, table: str, count: int) -> str:
    if not count:
        return ""
    name = table.replace('"', '""')
    cursor = connection.execute(f'SELECT * FROM "{name}" LIMIT {int(count)}')
    header = "\t".join(column[0] for column in cursor.description)
    rows = "\n".join("\t".join(str(cell)[:_CELL_CHARS] for cell in row) for row in cursor)
    return f"\n/* {count} rows:\n{header}\n{rows}\n*/".replace("\r", " ")


def _flat(key: Any) -> list[int]:
    return list(key) if isinstance(key, list) else [key]  # BIRD lists the parts of a key


def _entries(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise DataError(f"{path} is not JSON ({cause}); fetch it again") from cause
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} is no list of objects; expected Spider's description of its databases")
    return entries
