"""The reply cache: keys, several processes at once, kills, and files that are not ours."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_llms.cache import Entry, ReplyCache, cache_key
from generator_llms.replies import Completion, ServedModel
from verl.errors import ConfigError, GeneratorError

ENTRIES = 60


def reply_of(index: int) -> str:
    return f"reply {index} " * 50


def fill(path: Path, start: int) -> None:
    """Write all entries in a rotated order and read each back, as one of several processes."""
    cache = ReplyCache(path)
    for step in range(ENTRIES):
        index = (start + step) % ENTRIES
        cache.put(f"key {index}", "tiny", reply_of(index))
        assert cache.get(f"key {index}") == reply_of(index)
    cache.close()


def write_forever(path: Path) -> None:
    cache = ReplyCache(path)
    for index in range(10_000_000):
        cache.put(f"key {index}", "tiny", reply_of(index))


def test_a_reply_is_kept_over_a_restart_and_the_first_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "replies.sqlite"
    cache = ReplyCache(path)
    assert cache.get("k") is None
    cache.put("k", "tiny", "first")
    cache.put("k", "tiny", "second")
    cache.close()
    cache = ReplyCache(path)
    assert (cache.get("k"), cache.count()) == ("first", 1)
    cache.close()


def test_several_processes_fill_one_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(path, 7 * i)) for i in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    cache = ReplyCache(path)
    assert cache.count() == ENTRIES
    assert [cache.get(f"key {i}") for i in range(ENTRIES)] == [reply_of(i) for i in range(ENTRIES)]
    cache.close()


def test_a_killed_process_leaves_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    process = multiprocessing.get_context("spawn").Process(target=write_forever, args=(path,))
    process.start()
    cache = ReplyCache(path)
    deadline = time.monotonic() + 60
    while cache.count() < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    count = cache.count()
    assert count >= 5
    assert [cache.get(f"key {i}") for i in range(count)] == [reply_of(i) for i in range(count)]
    cache.put("after", "tiny", "still writable")
    assert cache.get("after") == "still writable"
    cache.close()


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("important notes, " * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="cache_path"):
        ReplyCache(path)
    assert path.read_bytes() == before


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_path"):
        ReplyCache(tmp_path)


def test_the_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customers (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="customers"):
        ReplyCache(path)
    assert path.read_bytes() == before


def read_all(path: Path) -> None:
    cache = ReplyCache(path)
    for i in range(200):
        assert cache.get(entry(i).key) in (entry(i).reply, None)
    cache.put("k", "tiny", "x")


def test_a_truncated_file_is_an_error_and_never_a_reply(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put_all(entry(i) for i in range(200))
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ConfigError, GeneratorError), match=r"cache_path=.*replies\.sqlite"):
        read_all(path)


def test_a_folder_that_nobody_can_write_is_refused() -> None:
    with pytest.raises(ConfigError, match="can be written"):
        ReplyCache(Path("/proc/nowhere/replies.sqlite"))


def read_as_nobody(path: Path, told: Connection) -> None:
    """Without the rights of root, tell what opening `path` for writing says and what reading alone finds."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        ReplyCache(path)
        told.send("opened")
    except ConfigError as error:
        told.send(str(error))
    cache = ReplyCache(path, read_only=True)
    told.send((cache.get("k"), cache.count()))
    cache.close()


def test_a_read_only_folder_can_be_replayed_from_but_not_written() -> None:
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter, unlike pytest's
        path = Path(folder) / "replies.sqlite"
        cache = ReplyCache(path)
        cache.put("k", "tiny", "kept")
        cache.close()
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        context = multiprocessing.get_context("fork")
        hears, tells = context.Pipe(duplex=False)
        process = context.Process(target=read_as_nobody, args=(path, tells))
        process.start()
        try:
            assert hears.poll(30)
            assert "cache_path" in hears.recv()
            assert hears.poll(30)
            assert hears.recv() == ("kept", 1)
        finally:
            process.join(30)
            Path(folder).chmod(0o755)


def test_what_is_open_for_reading_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    ReplyCache(path).close()
    cache = ReplyCache(path, read_only=True)
    with pytest.raises(GeneratorError, match="reading only"):
        cache.put("k", "tiny", "x")
    cache.close()


def test_a_reader_sees_what_another_process_writes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    writer = ReplyCache(path)
    reader = ReplyCache(path, read_only=True)
    assert reader.get("k") is None
    writer.put("k", "tiny", "new")
    assert reader.get("k") == "new"
    reader.close()
    writer.close()


def test_a_full_disk_is_an_error_and_leaves_the_cache_usable(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put("small", "tiny", "x")
    assert cache._writer is not None
    cache._writer.execute("PRAGMA max_page_count=12")
    with pytest.raises(GeneratorError, match="full"):
        cache.put("large", "tiny", "x" * 100_000)
    assert (cache.get("small"), cache.get("large")) == ("x", None)
    cache.put("another", "tiny", "y")
    assert cache.get("another") == "y"
    cache.close()


def version_1(path: Path) -> None:
    """Write a file as the first version did."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(
        "CREATE TABLE replies (key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, created REAL NOT NULL)"
        " WITHOUT ROWID"
    )
    rows = [(f"key {i}", "tiny", reply_of(i), 1000.0 + i) for i in range(ENTRIES)]
    connection.executemany("INSERT INTO replies VALUES (?, ?, ?, ?)", rows)
    connection.execute("PRAGMA user_version=1")
    connection.commit()
    connection.close()


def test_a_file_of_the_first_version_is_brought_up_to_date_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    version_1(path)
    with pytest.raises(ConfigError, match=r"schema 1.*cache_mode=use"):
        ReplyCache(path, read_only=True)
    cache = ReplyCache(path)
    found = list(cache.entries())
    cache.close()
    assert sorted(found, key=lambda e: e.created) == [
        Entry(f"key {i}", "tiny", reply_of(i), 1000.0 + i, 1000.0 + i) for i in range(ENTRIES)
    ]


def test_several_processes_bring_one_file_up_to_date_at_once(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    version_1(path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(path, 7 * i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def entry(index: int, model: str = "tiny", used: float = 0.0) -> Entry:
    return Entry(f"{index:064x}", model, reply_of(index), 0.0, used)


def test_a_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    clock = Clock()
    bound = 400_000
    cache = ReplyCache(tmp_path / "replies.sqlite", max_bytes=bound, clock=clock)
    largest = 0
    for i in range(2000):
        clock.now += 10_000
        cache.put(entry(i).key, "tiny", reply_of(i))
        cache.get(entry(0).key)  # an old one that stays in use
        largest = max(largest, cache.size())
    assert largest <= 1.1 * bound
    assert cache.get(entry(0).key) == reply_of(0)
    assert cache.get(entry(1).key) is None and cache.get(entry(1999).key) == reply_of(1999)
    assert 100 < cache.count() < 1500
    cache.close()


def test_a_use_is_noted_once_an_hour(tmp_path: Path) -> None:
    clock = Clock()
    cache = ReplyCache(tmp_path / "replies.sqlite", clock=clock)
    cache.put("k", "tiny", "x")
    clock.now += 3000
    cache.get("k")
    cache.put("other", "tiny", "x")
    assert [e.used for e in cache.entries() if e.key == "k"] == [1_000_000.0]
    clock.now += 3000
    cache.get("k")
    cache.close()
    cache = ReplyCache(tmp_path / "replies.sqlite")
    assert [e.used for e in cache.entries() if e.key == "k"] == [1_006_000.0]
    cache.close()


def test_all_uses_are_noted_in_the_end(tmp_path: Path) -> None:
    clock = Clock()
    cache = ReplyCache(tmp_path / "replies.sqlite", clock=clock)
    cache.put_all(entry(i) for i in range(700))
    for i in range(700):
        cache.get(entry(i).key)
    cache.close()
    cache = ReplyCache(tmp_path / "replies.sqlite")
    assert {e.used for e in cache.entries()} == {clock.now}
    cache.close()


def test_pruning_removes_a_model_or_an_age_or_both_and_nothing_else(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    cache.put_all(entry(i, "ab"[i % 2], used=float(i)) for i in range(1000))
    assert cache.prune("a", 500.0) == 250
    assert {(e.model, e.used < 500) for e in cache.entries()} == {("b", True), ("b", False), ("a", False)}
    assert cache.prune(unused_since=100.0) == 50
    assert cache.prune("b") == 450
    assert cache.count() == 250 and cache.prune("nobody") == 0
    cache.close()


def test_compacting_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put_all(entry(i) for i in range(3000))
    cache.prune("tiny")
    cache.compact()
    cache.close()
    assert path.stat().st_size < 100_000


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    assert cache.put_all([entry(1), entry(2)]) == 2
    assert cache.put_all([entry(1), entry(3)]) == 1
    cache.put(entry(1).key, "tiny", "new", overwrite=True)
    assert cache.get(entry(1).key) == "new" and cache.count() == 3
    cache.close()


def test_what_endpoints_serve_is_remembered(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "replies.sqlite")
    assert cache.served("here") is None
    cache.put_served("here", ServedModel("tiny", 8192))
    cache.put_served("there", ServedModel("large", None))
    cache.put_served("here", ServedModel("tiny", 4096))
    assert cache.served("here") == ServedModel("tiny", 4096)
    assert cache.all_served() == {"here": ServedModel("tiny", 4096), "there": ServedModel("large", None)}
    cache.close()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(ConfigError, match="schema 99"):
        ReplyCache(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_key_does_not_depend_on_the_order_of_fields(request_: dict[str, object]) -> None:
    assert cache_key(request_) == cache_key(dict(reversed(request_.items())))


@given(st.text(), st.text())
def test_different_messages_have_different_keys(first: str, second: str) -> None:
    keys = [cache_key({"messages": [{"content": text}]}) for text in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


@given(st.builds(Completion, text=st.text(), finish=st.text(), prompt_tokens=st.integers()))
def test_a_completion_survives_the_cache(completion: Completion) -> None:
    stored = Completion.from_json(completion.to_json())
    assert stored.cached
    assert (stored.text, stored.finish, stored.prompt_tokens, stored.logprobs) == (
        completion.text,
        completion.finish,
        completion.prompt_tokens,
        completion.logprobs,
    )


def test_logprobs_survive_the_cache_to_the_bit() -> None:
    completion = Completion("a", logprobs=(-0.1, -1e-300))
    assert Completion.from_json(completion.to_json()).logprobs == (-0.1, -1e-300)
