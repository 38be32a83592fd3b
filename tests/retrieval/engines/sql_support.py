"""Databases and hostile statements for the tests of the SQL engine and of what uses it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from verl.retrieval.engines.sql import SqlEngine
from verl.rewards.sql_config import SqlConfig

SPIDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "spider_en"
needs_spider = pytest.mark.skipif(not SPIDER.is_dir(), reason="../shared/data/spider_en is not here")

SCRIPT = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age REAL, photo BLOB);
INSERT INTO singer VALUES (1, 'Ann', 30, x'00ff'), (2, 'Bo', 41.5, NULL), (3, 'Cy', 30, NULL);
INSERT INTO singer VALUES (4, 'Dé ''x''', NULL, NULL);
CREATE TABLE empty (a, b);
"""


@dataclass(frozen=True)
class Hostile:
    """A statement that must do no harm; `kinds` are the errors that it may end with, an empty one being rows."""

    name: str
    kinds: tuple[str, ...]
    hangs: bool
    parts: tuple[tuple[str, int], ...]

    def sql(self, table: str, folder: Path) -> str:
        """Return the statement; parts are repeated, so that the file of statements stays readable."""
        whole = "".join(text * times for text, times in self.parts)
        return whole.replace("{table}", table).replace("{folder}", str(folder))


def hostile() -> list[Hostile]:
    lines = Path(__file__).with_name("hostile_sql.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Hostile(row["name"], tuple(row["kinds"]), row["hangs"], tuple((text, times) for text, times in row["parts"]))
        for row in map(json.loads, lines)
    ]


def make_database(path: Path, script: str = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def some_table(path: Path) -> str:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    connection.close()
    return next(name for name in names if name.isidentifier() and name.lower() not in ("transaction", "order", "group"))


def contents(folder: Path) -> dict[str, str]:
    """Return every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def engine(databases: Path, **settings: Any) -> SqlEngine:
    return SqlEngine(SqlConfig(databases, **{"timeout_s": 20.0, "workers": 2, **settings}))


def spider_rows() -> Iterator[dict[str, Any]]:
    for name in ("dev.jsonl", "train_subset.jsonl"):
        for line in (SPIDER / name).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
