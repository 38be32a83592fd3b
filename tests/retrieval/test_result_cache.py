from __future__ import annotations

import logging
import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import ConfigError
from verl.retrieval.result_cache import DiskCache, MemoryCache, _size
from verl.retrieval.wire import Rendered

MEGABYTE = 1024 * 1024


def hits(count: int, size: int = 20, of: str = "x") -> Rendered:
    documents = tuple(f'"{of}{at}'.ljust(size, ".").encode() + b'"' for at in range(count))
    return Rendered(documents, tuple(f"{count - at}.5".encode() for at in range(count)))


def test_a_larger_topk_answers_a_smaller() -> None:
    cache = MemoryCache(MEGABYTE)
    cache.put("q", 5, hits(5))
    assert cache.get("q", 5) == hits(5)
    assert cache.get("q", 2) == hits(5).head(2)
    assert cache.get("q", 6) is None and cache.get("other", 1) is None


def test_a_result_that_found_all_there_is_answers_any_topk() -> None:
    cache = MemoryCache(MEGABYTE)
    cache.put("q", 5, hits(3))
    assert cache.get("q", 1000) == hits(3)
    cache.put("none", 5, hits(0))
    assert cache.get("none", 9) == hits(0)


def test_a_fuller_result_replaces_and_a_poorer_does_not() -> None:
    cache = MemoryCache(MEGABYTE)
    cache.put("q", 2, hits(2))
    cache.put("q", 5, hits(5))
    cache.put("q", 3, hits(3))
    assert cache.get("q", 5) == hits(5) and len(cache) == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = MemoryCache(10_000)
    for name in "abcdefgh":
        cache.put(name, 4, hits(4, size=100))
        assert cache.get("a", 4) is not None
    assert cache.get("a", 4) is not None and cache.get("h", 4) is not None and cache.get("b", 4) is None
    assert cache.bytes <= 10_000


def test_one_result_never_empties_the_cache() -> None:
    cache = MemoryCache(10_000)
    cache.put("small", 1, hits(1))
    cache.put("huge", 9, hits(9, size=1000))
    assert cache.get("small", 1) is not None and cache.get("huge", 1) is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 6), st.integers(0, 6)), max_size=40))
def test_the_bytes_are_those_of_what_is_kept(puts: list[tuple[str, int, int]]) -> None:
    cache = MemoryCache(6000)
    for query, topk, found in puts:
        cache.put(query, topk, hits(min(found, topk), size=100))
        assert 0 <= cache.bytes <= 6000
    assert cache.bytes == sum(_size(query, kept.hits) for query, kept in cache._kept.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "results.sqlite"


def test_results_outlive_the_process_and_are_shared(path: Path) -> None:
    first, second = DiskCache(path, "f1", MEGABYTE), DiskCache(path, "f1", MEGABYTE)
    first.put_many([("a", hits(5, of="a")), ("b", hits(2, of="ü")), ("none", hits(0))], 5)
    wanted = {"a": 3, "b": 50, "none": 1, "missing": 1}
    expected = {"a": hits(5, of="a").head(3), "b": hits(2, of="ü"), "none": hits(0)}
    assert second.get_many(wanted) == expected
    first.close(), second.close()
    assert DiskCache(path, "f1", MEGABYTE).get_many(wanted) == expected


def test_another_engine_finds_nothing(path: Path) -> None:
    DiskCache(path, "f1", MEGABYTE).put_many([("a", hits(2, of="one"))], 2)
    other = DiskCache(path, "f2", MEGABYTE)
    assert other.get_many({"a": 1}) == {}
    other.put_many([("a", hits(2, of="two"))], 2)
    assert other.get_many({"a": 2}) == {"a": hits(2, of="two")}
    assert DiskCache(path, "f1", MEGABYTE).get_many({"a": 2}) == {"a": hits(2, of="one")}


def test_on_disk_too_the_fuller_result_stays(path: Path) -> None:
    cache = DiskCache(path, "f", MEGABYTE)
    cache.put_many([("a", hits(5))], 5)
    cache.put_many([("a", hits(3))], 3)
    assert cache.get_many({"a": 5}) == {"a": hits(5)}
    cache.put_many([("a", hits(7))], 7)
    assert cache.get_many({"a": 7}) == {"a": hits(7)}


def test_more_queries_than_one_statement_takes(path: Path) -> None:
    cache = DiskCache(path, "f", 100 * MEGABYTE)
    cache.put_many([(f"q{n}", hits(1, of=str(n))) for n in range(1300)], 1)
    found = cache.get_many({f"q{n}": 1 for n in range(1300)})
    assert found == {f"q{n}": hits(1, of=str(n)) for n in range(1300)}


def test_the_file_stays_within_its_size_and_drops_the_oldest(path: Path) -> None:
    cache = DiskCache(path, "f", 2 * MEGABYTE)
    for start in range(0, 4000, 50):
        cache.put_many([(f"q{n}", hits(8, size=300, of=str(n))) for n in range(start, start + 50)], 8)
    assert cache.get_many({"q3999": 8}) and not cache.get_many({"q0": 8})
    cache.close()
    assert path.stat().st_size < 3 * MEGABYTE


def test_a_file_that_is_something_else_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (a)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"holds something else than cached results.*pass another --cache_file"):
        DiskCache(path, "f", MEGABYTE)
    assert path.read_bytes() == before
    path.write_text("no database at all, but long enough to be looked into" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        DiskCache(path, "f", MEGABYTE)


def test_damage_costs_the_cache_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(path, "f", MEGABYTE)
    cache.put_many([(f"q{n}", hits(8, size=500)) for n in range(50)], 8)
    cache.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x7f" * (len(content) - 4096)
    path.write_bytes(content)
    damaged = DiskCache(path, "f", MEGABYTE)
    with caplog.at_level(logging.ERROR):
        assert damaged.get_many({f"q{n}": 1 for n in range(50)}) == {}
        damaged.put_many([("a", hits(1))], 1)
        assert damaged.get_many({"a": 1}) == {}
    (record,) = caplog.records
    assert "is used no longer" in record.getMessage()


def test_an_entry_whose_parts_do_not_fit_is_not_used(path: Path) -> None:
    cache = DiskCache(path, "f", MEGABYTE)
    cache.put_many([("a", hits(3))], 3)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE results SET documents = substr(documents, 2)")
    assert cache.get_many({"a": 1}) == {}


def write_many(path: Path, worker: int) -> None:
    cache = DiskCache(path, "f", 10 * MEGABYTE)
    for number in range(60):
        cache.put_many([(f"q{number}", hits(3, of=str(number))), (f"w{worker}-{number}", hits(2))], 3)
    cache.close()


def test_several_processes_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    wanted = {f"q{n}": 3 for n in range(60)} | {f"w{w}-{n}": 2 for w in range(3) for n in range(60)}
    assert len(DiskCache(path, "f", 10 * MEGABYTE).get_many(wanted)) == len(wanted)
