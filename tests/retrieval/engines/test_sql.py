"""The SQL engine: what it returns, what it refuses, what it survives, and that no database ever changes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.retrieval.engines.sql_support import (
    SPIDER,
    contents,
    engine,
    hostile,
    make_database,
    needs_spider,
    some_table,
)
from verl.errors import RetrieverError
from verl.retrieval.engines.sql import SqlEngine
from verl.retrieval.engines.sql_files import find_database
from verl.types import Question, SqlResult

TIGHT = {"timeout_s": 0.3, "max_rows": 5000, "max_mb": 4, "memory_mb": 64}
EVERYWHERE = 76
"""The first so many hostile statements try to write, to reach files, settings or a second statement."""


def asked(**extra: str) -> Question:
    return Question("toy/0", "How many?", ("SELECT 1",), "toy", extra=extra)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return make_database(tmp_path / "databases" / "toy" / "toy.sqlite")


async def run(database: Path, *statements: str, **limits: float) -> list[SqlResult]:
    tool = engine(database.parent, **limits)
    try:
        return [await tool.run(database, sql) for sql in statements]
    finally:
        await tool.aclose()


async def test_rows_come_as_they_are(database: Path) -> None:
    before = contents(database.parent)
    rows, empty, computed = await run(
        database,
        "SELECT id, name, age, photo FROM singer ORDER BY id;  -- all of them",
        "SELECT a, b FROM empty",
        "WITH x AS (SELECT 2 a UNION ALL SELECT 3) SELECT count(*), sum(a), 9e999, -9223372036854775808 FROM x",
    )
    assert rows.rows == (
        (1, "Ann", 30.0, b"\x00\xff"),
        (2, "Bo", 41.5, None),
        (3, "Cy", 30.0, None),
        (4, "Dé 'x'", None, None),
    )
    assert (rows.columns, rows.error, rows.size > 0) == (4, "", True)
    assert (empty.rows, empty.columns, empty.error) == ((), 2, "")
    assert computed.rows == ((2, 5, float("inf"), -(2**63)),)
    assert contents(database.parent) == before


async def test_what_only_computes_is_admitted(database: Path) -> None:
    found = await run(
        database,
        "SELECT rank() OVER (ORDER BY age), lag(name) OVER (ORDER BY id) FROM singer",
        "SELECT strftime('%Y', '2020-01-02'), julianday('2020-01-01'), round(sqrt(2), 3), upper('a') || lower('B')",
        "SELECT json_extract('{\"a\": [1, 2]}', '$.a[1]'), value FROM json_each('[7]')",
        "SELECT group_concat(name, '/'), total(age) FROM singer GROUP BY age HAVING count(*) > 1",
        "VALUES (1, 'x'), (2, 'y')",
        "SELECT name FROM sqlite_master ORDER BY name",
        "SELECT count(*) FROM singer a JOIN singer b ON a.age = b.age INTERSECT SELECT 5",
    )
    assert [result.error for result in found] == [""] * 7
    assert found[1].rows == (("2020", 2458849.5, 1.414, "Ab"),)
    assert found[2].rows == ((2, 7),)
    assert found[5].rows == (("empty",), ("singer",))
    assert found[6].rows == ((5,),)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELEC 1", "syntax"),
        ("SELECT", "syntax"),
        ("SELECT 'open", "syntax"),
        ("SELECT * FROM nowhere", "invalid"),
        ("SELECT missing FROM singer", "invalid"),
        ("SELECT id FROM singer a, singer b", "invalid"),
        ("SELECT max(name, 1, 2) OVER () FROM singer", "invalid"),
        ("", "no_statement"),
    ],
)
async def test_kinds_of_errors(database: Path, sql: str, kind: str) -> None:
    (result,) = await run(database, sql)
    assert (result.error, result.rows) == (kind, ())
    assert result.message


async def test_limits_are_met_exactly(database: Path) -> None:
    counted = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {}) SELECT x FROM c"
    just, over = await run(database, counted.format(700), counted.format(701), max_rows=700)
    assert (len(just.rows), over.error, over.rows) == (700, "too_many_rows", ())
    fits, value, result = await run(
        database,
        "SELECT hex(zeroblob(400000))",
        "SELECT hex(zeroblob(600000))",
        "SELECT hex(zeroblob(400000)), hex(zeroblob(400000))",
        max_mb=1,
    )
    assert (len(str(fits.rows[0][0])), value.error, result.error) == (800_000, "too_large", "too_large")
    short, long = await run(database, "SELECT 1".ljust(60), "SELECT 1".ljust(61), max_chars=60)
    assert (short.rows, long.error) == (((1,),), "too_large")


async def test_memory_is_bounded_and_the_next_statement_runs(database: Path) -> None:
    hungry = (
        "WITH RECURSIVE c(i, x) AS (SELECT 1, hex(zeroblob(20000)) UNION ALL SELECT i + 1, x FROM c) "
        "SELECT x FROM c ORDER BY i DESC"
    )
    results = await run(database, hungry, "SELECT 1", memory_mb=32)
    assert [result.error for result in results] == ["memory", ""]


async def check_harmless(databases: list[Path], folder: Path, slow: bool, count: int | None = None) -> None:
    """Run hostile statements on databases; their kinds are as stated, and nothing below `folder` changes."""
    before = contents(folder)
    tool = engine(folder, **TIGHT)
    try:
        for database in databases:
            table = some_table(database)
            for case in hostile()[:count]:
                if slow or not case.hangs:
                    result = await tool.run(database, case.sql(table, folder))
                    assert result.error in case.kinds, (database.name, case.name, result.error, result.message)
        assert (await tool.run(databases[0], "SELECT 1")).rows == ((1,),)
    finally:
        await tool.aclose()
    assert contents(folder) == before


def test_the_hostile_statements_are_many_and_different() -> None:
    cases = hostile()
    assert len(cases) >= 60
    assert len({case.name for case in cases}) == len({case.parts for case in cases}) == len(cases)
    assert {"refused", "timeout", "too_large", "several_statements"} <= {kind for c in cases for kind in c.kinds}


async def test_hostile_statements_do_no_harm(database: Path, tmp_path: Path) -> None:
    await check_harmless([database], tmp_path, slow=True)


@needs_spider
async def test_hostile_statements_leave_every_real_database_as_it_is(tmp_path: Path) -> None:
    """On copies that could be written, for read-only originals would prove nothing."""
    copied = Path(shutil.copytree(SPIDER / "database", tmp_path / "copies"))
    copied.chmod(0o755)
    databases = sorted(copied.glob("*.sqlite"))
    for path in databases:
        path.chmod(0o644)
    await check_harmless(databases, tmp_path, slow=False, count=EVERYWHERE)
    await check_harmless([copied / "bike_1.sqlite"], tmp_path, slow=True)


SCRAPS = ["SELECT ", "* FROM singer ", "DROP ", "(", ")", "'", '"', "--", "/*", ";", "UNION ", "ATTACH ", "\0", "WITH "]


def test_any_text_has_an_outcome(database: Path) -> None:
    tool = engine(database.parent, **TIGHT)
    before = contents(database.parent)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.text(max_size=30) | st.sampled_from(SCRAPS), max_size=12).map("".join))
    def check(sql: str) -> None:
        result = asyncio.run(tool.run(database, sql))
        assert result.error or result.columns

    check()
    tool.close()
    assert contents(database.parent) == before


async def test_a_missing_database_is_an_error_and_no_file(tmp_path: Path) -> None:
    (result,) = await run(tmp_path / "gone.sqlite", "SELECT 1")
    assert (result.error, list(tmp_path.iterdir())) == ("missing_database", [])
    tool = engine(tmp_path)
    asking = asked(db_id="gone")
    assert (await tool(asking, "SELECT 1")).error == "missing_database"
    make_database(tmp_path / "gone.sqlite")
    assert (await tool(asking, "SELECT 1")).rows == ((1,),), "it has come"
    await tool.aclose()


async def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_bytes(b"This is no database, however long it may be. " * 100)
    assert (await run(path, "SELECT * FROM t"))[0].error == "unreadable_database"


async def test_a_journal_beside_the_database_is_not_overlooked(tmp_path: Path) -> None:
    path = make_database(tmp_path / "wal.sqlite", "PRAGMA journal_mode=WAL; CREATE TABLE t (a);")
    writer = sqlite3.connect(path)
    writer.execute("INSERT INTO t VALUES (1)")
    writer.commit()
    assert path.with_name("wal.sqlite-wal").stat().st_size > 0
    (result,) = await run(path, "SELECT a FROM t")
    assert result.rows == ((1,),) or result.error == "unreadable_database"
    writer.close()


async def test_a_lock_of_somebody_else_does_not_matter(database: Path) -> None:
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert (await run(database, "SELECT count(*) FROM singer"))[0].rows == ((4,),)
    other.close()


async def test_text_that_is_no_utf8_stays_distinct(tmp_path: Path) -> None:
    path = make_database(tmp_path / "latin.sqlite", "CREATE TABLE t (a); INSERT INTO t VALUES (CAST(x'e9' AS TEXT)),"
                         "(CAST(x'ea' AS TEXT)), (CAST(x'c3a9' AS TEXT));")  # fmt: skip
    (result,) = await run(path, "SELECT a FROM t")
    assert len(set(result.rows)) == 3
    assert result.rows[2] == ("é",)


@pytest.mark.parametrize(
    "db_id", ["../secret", "..", ".", "", "/etc/passwd", "a/../../secret", "secret\0", "secret\n", "~", "x" * 5000]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, db_id: str) -> None:
    make_database(tmp_path / "secret.sqlite")
    make_database(tmp_path / "inside" / "a" / "a.sqlite")
    assert find_database(tmp_path / "inside", db_id) is None
    assert find_database(tmp_path / "inside", "", f"{db_id}.sqlite") is None
    assert find_database(tmp_path / "inside", "", db_id) is None


def test_no_link_leads_out_of_the_folder(tmp_path: Path) -> None:
    make_database(tmp_path / "secret.sqlite")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link.sqlite").symlink_to(tmp_path / "secret.sqlite")
    assert find_database(tmp_path / "inside", "link") is None


def test_where_databases_lie(tmp_path: Path) -> None:
    flat = make_database(tmp_path / "database" / "flat.sqlite")
    nested = make_database(tmp_path / "dev" / "dev_databases" / "formula_1" / "formula_1.sqlite")
    assert find_database(tmp_path, "flat") == flat.resolve()
    assert find_database(tmp_path, "formula_1") == nested.resolve()
    published = "data/sql/bird/dev/dev_databases/formula_1/formula_1.sqlite"
    assert find_database(tmp_path, "", published) == nested.resolve()
    assert find_database(tmp_path / "dev", "other", f"/home/somebody/{published}") == nested.resolve()
    assert find_database(tmp_path, "formula_1", "gone/gone.sqlite") == nested.resolve()
    assert find_database(tmp_path, "formula_2") is None


async def test_golds_are_kept_and_errors_are_not(tmp_path: Path) -> None:
    path = make_database(tmp_path / "toy.sqlite")
    tool = engine(tmp_path)
    results = await asyncio.gather(*(tool.run(path, "SELECT count(*) FROM singer", keep=True) for _ in range(20)))
    assert {result.rows for result in results} == {((4,),)}
    assert all(result is results[0] for result in results), "made once"
    assert (await tool.run(path, "SELECT * FROM later", keep=True)).error == "invalid"
    path.unlink()
    make_database(path, "CREATE TABLE later (a);")
    assert (await tool.run(path, "SELECT count(*) FROM singer", keep=True)).rows == ((4,),)
    assert (await tool.run(path, "SELECT * FROM later", keep=True)).error == ""
    assert (await tool.run(path, "SELECT count(*) FROM singer")).error == "invalid"
    await tool.aclose()


async def test_what_is_kept_is_bounded(database: Path) -> None:
    tool = engine(database.parent, cache_mb=1)
    statements = [f"SELECT {number}, hex(zeroblob(200000))" for number in range(5)]
    first = [await tool.run(database, sql, keep=True) for sql in statements]
    again = await tool.run(database, statements[-1], keep=True)
    forgotten = await tool.run(database, statements[0], keep=True)
    assert again is first[-1]
    assert forgotten is not first[0] and forgotten.rows == first[0].rows
    await tool.aclose()


async def test_many_statements_at_once(database: Path) -> None:
    tool = engine(database.parent)
    results = await asyncio.gather(*(tool.run(database, f"SELECT {number}") for number in range(300)))
    assert [result.rows for result in results] == [((number,),) for number in range(300)]
    assert len(tool._workers) <= 2
    await tool.aclose()


async def test_a_killed_process_is_replaced(database: Path) -> None:
    tool = engine(database.parent, workers=1)
    await tool.run(database, "SELECT 1")
    (worker,) = tool._workers
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert (await tool.run(database, "SELECT 2")).rows == ((2,),)
    await tool.aclose()


async def killed_again_and_again(tool: SqlEngine) -> None:
    while True:
        for worker in list(tool._workers):
            os.kill(worker._process.pid, signal.SIGKILL)
        await asyncio.sleep(0.02)


async def test_a_process_that_dies_of_its_statement_is_a_crash(database: Path) -> None:
    tool = engine(database.parent, workers=1)
    killer = asyncio.create_task(killed_again_and_again(tool))
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    result = await tool.run(database, endless)
    killer.cancel()
    assert (result.error, result.message) == ("crash", "its process died, 2 times")
    assert (await tool.run(database, "SELECT 2")).rows == ((2,),)
    await tool.aclose()


async def test_a_cancelled_question_does_no_harm(database: Path) -> None:
    tool = engine(database.parent, workers=1, timeout_s=0.3)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    task = asyncio.create_task(tool.run(database, endless))
    await asyncio.sleep(0.1)
    task.cancel()
    assert (await tool.run(database, "SELECT 2")).rows == ((2,),)
    await tool.aclose()


async def test_a_closed_engine_says_so(database: Path) -> None:
    tool = engine(database.parent)
    await tool.run(database, "SELECT 1")
    (worker,) = tool._workers
    await tool.aclose()
    assert worker._process.poll() is not None
    with pytest.raises(RetrieverError, match="closed"):
        await tool.run(database, "SELECT 1")


def test_an_engine_outlives_an_event_loop(database: Path) -> None:
    tool = engine(database.parent)
    for _ in range(2):
        assert asyncio.run(tool.run(database, "SELECT 1", keep=True)).rows == ((1,),)
    tool.close()
