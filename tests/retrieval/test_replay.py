from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.replay import ReplayCache, ReplayMode, ReplayRequest

REQUEST = ReplayRequest("serper", "what is a whale", 10, {"page": 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "web answers #1?.sqlite"


@pytest.fixture
def recorder(path: Path) -> Iterator[ReplayCache]:
    cache = ReplayCache(path, "record")
    yield cache
    cache.close()


def test_what_was_recorded_is_found_again_and_replayed_after_a_restart(recorder: ReplayCache, path: Path) -> None:
    assert recorder.find(REQUEST) is None
    body = b'{"organic": []}\x00\xff'
    assert recorder.store(REQUEST, body) == body
    assert recorder.find(REQUEST) == body and (recorder.found, recorder.stored, len(recorder)) == (1, 1, 1)
    recorder.close()
    replayed = ReplayCache(path, "replay")
    assert replayed.find(REQUEST) == body
    replayed.close()


@pytest.mark.parametrize(
    "other",
    [
        ReplayRequest("serpapi", REQUEST.query, 10, {"page": 1}),
        ReplayRequest("serper", REQUEST.query + " ", 10, {"page": 1}),
        ReplayRequest("serper", REQUEST.query, 20, {"page": 1}),
        ReplayRequest("serper", REQUEST.query, 10, {"page": 2}),
        ReplayRequest("serper", REQUEST.query, 10, {"page": "1"}),
        ReplayRequest("serper", REQUEST.query, 10, {}),
    ],
)
def test_whatever_decides_the_answer_is_part_of_the_key(recorder: ReplayCache, other: ReplayRequest) -> None:
    recorder.store(REQUEST, b"answer")
    assert recorder.find(other) is None


def test_the_order_of_the_parameters_is_not_part_of_the_key() -> None:
    assert ReplayRequest("e", "q", 1, {"a": 1, "b": 2}).key == ReplayRequest("e", "q", 1, {"b": 2, "a": 1}).key


def test_a_replay_says_what_is_missing(recorder: ReplayCache, path: Path) -> None:
    recorder.store(REQUEST, b"answer")
    replayed = ReplayCache(path, "replay")
    with pytest.raises(RetrieverError, match=r"no answer of serper to 'other' \(topk=3, \{\"page\": 2\}\); record"):
        replayed.find(ReplayRequest("serper", "other", 3, {"page": 2}))
    with pytest.raises(RetrieverError, match="read-only in mode replay"):
        replayed.store(REQUEST, b"other")
    assert len(replayed) == 1
    replayed.close()


def test_the_first_record_of_an_answer_stays(recorder: ReplayCache, path: Path) -> None:
    other = ReplayCache(path, "record")
    assert recorder.find(REQUEST) is None and other.find(REQUEST) is None
    assert recorder.store(REQUEST, b"first") == b"first"
    assert other.store(REQUEST, b"second") == b"first"
    assert other.find(REQUEST) == b"first"
    other.close()


def test_refresh_asks_once_more_and_replaces(path: Path) -> None:
    now = 1000.0
    caches: list[ReplayCache] = []

    def reopen(mode: ReplayMode) -> ReplayCache:
        caches.append(ReplayCache(path, mode, clock=lambda: now))
        return caches[-1]

    reopen("record").store(REQUEST, b"old")
    now = 2000.0
    refreshed = reopen("refresh")
    now = 2001.0
    assert refreshed.find(REQUEST) is None
    assert refreshed.store(REQUEST, b"new") == b"new"
    assert refreshed.find(REQUEST) == b"new"
    assert reopen("replay").find(REQUEST) == b"new"
    for cache in caches:
        cache.close()


def test_off_keeps_nothing(path: Path) -> None:
    for cache in (ReplayCache(None, "off"), ReplayCache(path, "off")):
        assert cache.store(REQUEST, b"answer") == b"answer"
        assert cache.find(REQUEST) is None and len(cache) == 0
        cache.close()
    assert not path.exists()


@given(query=st.text(st.characters(), max_size=30), body=st.binary(max_size=200))
def test_any_text_and_any_bytes_survive(tmp_path_factory: pytest.TempPathFactory, query: str, body: bytes) -> None:
    cache = ReplayCache(tmp_path_factory.mktemp("replay") / "cache.sqlite", "record")
    request = ReplayRequest("engine", query, 1, {"lone": "\ud800"})
    cache.store(request, body)
    assert cache.find(request) == body
    cache.close()


def test_threads_share_a_cache(recorder: ReplayCache) -> None:
    def write(writer: int) -> None:
        for number in range(50):
            request = ReplayRequest("e", str(number), 1)
            assert recorder.store(request, f"{writer}".encode()) == recorder.find(request)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorder) == 50 and recorder.stored == 200


def _record(path: Path, writer: int, seen: multiprocessing.Queue[list[bytes]]) -> None:
    cache = ReplayCache(path, "record")
    seen.put([cache.store(ReplayRequest("e", str(number), 1), f"{writer}".encode()) for number in range(30)])
    cache.close()


def test_processes_create_and_fill_one_file_together_and_agree(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    seen: multiprocessing.Queue[list[bytes]] = context.Queue()
    processes = [context.Process(target=_record, args=(path, writer, seen)) for writer in range(3)]
    for process in processes:
        process.start()
    answers = [seen.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_file_of_another_kind_is_refused_for_replay(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DataError, match="name another file"):
        ReplayCache(path, "replay")


def test_another_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (value TEXT)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match="no replay cache of format 1"):
        ReplayCache(path, "record")
    assert path.read_bytes() == before


def test_a_truncated_file_is_an_error_and_no_answer(recorder: ReplayCache, path: Path) -> None:
    for number in range(200):
        recorder.store(ReplayRequest("e", str(number), 1), bytes(range(256)) * 8)
    recorder.close()
    path.write_bytes(path.read_bytes()[:9000])

    def read_all() -> None:
        cache = ReplayCache(path, "replay")
        for number in range(200):
            cache.find(ReplayRequest("e", str(number), 1))

    with pytest.raises((DataError, RetrieverError), match=r"web answers"):
        read_all()


def test_a_damaged_answer_is_an_error(recorder: ReplayCache, path: Path) -> None:
    recorder.store(REQUEST, b"answer" * 100)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET body = substr(body, 1, 5)")
    database.close()
    with pytest.raises(RetrieverError, match="damaged answer"):
        recorder.find(REQUEST)


def test_wrong_ways_to_open(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rewind' is unknown; expected one of record, replay, off, refresh"):
        ReplayCache(tmp_path / "x", "rewind")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a file"):
        ReplayCache(None, "record")
    with pytest.raises(DataError, match="no such file; record it first"):
        ReplayCache(tmp_path / "x", "replay")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be opened"):
        ReplayCache(tmp_path / "file" / "x", "record")
