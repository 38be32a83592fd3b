"""The reply cache: keys, several processes at once, kills, and files that are not ours."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator_llms.cache import ReplyCache, cache_key
from generator_llms.replies import Completion
from verl.errors import ConfigError

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
