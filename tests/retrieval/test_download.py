from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from data_preprocess import medcorp
from tests.retrieval.hub_server import FakeHub, HubFile, serve
from verl.errors import DataError
from verl.retrieval.assemble import join, unzip
from verl.retrieval.corpus import Corpus
from verl.retrieval.download import ITEMS as PUBLISHED
from verl.retrieval.download import DownloadOptions, Item, download
from verl.retrieval.hub import Patience, RemoteFile, fetch, list_files

ROOT = Path(__file__).resolve().parents[2]
FAST = Patience(timeout_s=5.0, attempts=3, backoff_s=0.01, max_backoff_s=0.02)
RNG = random.Random(0)
PART_A, PART_B = RNG.randbytes(300_000), RNG.randbytes(123_457)
PASSAGES = b"".join(b'{"id": "%d", "contents": "T\\nx"}\n' % n for n in range(5000))
ITEMS = {
    "index": Item("", "owner/index", "dataset", "e5_Flat.index", "join", ("part_aa", "part_ab")),
    "corpus": Item("", "owner/corpus", "dataset", "wiki.jsonl", "unzip", ("wiki.jsonl.gz",)),
    "checkpoint": Item("", "owner/model", "model", "model"),
    "chunks": Item("", "owner/chunks", "dataset", "medcorp/textbooks"),
}
CHUNK = b'{"id": "Anatomy_Gray_0", "title": "Anatomy_Gray", "content": "What is anatomy?"}'


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    repos = {
        "datasets/owner/index": {
            ".gitattributes": HubFile(b"*", lfs=False),
            "part_aa": HubFile(PART_A),
            "part_ab": HubFile(PART_B),
        },
        "datasets/owner/chunks": {"README.md": HubFile(b"#", lfs=False), "chunk/Anatomy_Gray.jsonl": HubFile(CHUNK)},
        "datasets/owner/corpus": {"wiki.jsonl.gz": HubFile(gzip.compress(PASSAGES))},
        "models/owner/model": {
            "config.json": HubFile(b"{}", lfs=False),
            "nested/weights.bin": HubFile(PART_B),
            "empty": HubFile(b"", lfs=False),
        },
    }
    with serve(repos) as running:
        yield running


@pytest.fixture
def get(hub: FakeHub, tmp_path: Path) -> Callable[..., None]:
    def run(*names: str, **options: object) -> None:
        download(names, tmp_path, DownloadOptions(endpoint=hub.url, patience=FAST, **options), ITEMS)

    return run


def test_chunks_of_a_part_of_medcorp_go_into_its_folder_and_become_a_corpus(
    get: Callable[..., None], tmp_path: Path
) -> None:
    get("chunks")
    get("chunks")
    assert (tmp_path / "medcorp" / "textbooks" / "chunk" / "Anatomy_Gray.jsonl").read_bytes() == CHUNK
    assert medcorp.convert([tmp_path / "medcorp"], tmp_path / "medcorp.jsonl")["chunks"] == 1
    (document,) = Corpus.open(tmp_path / "medcorp.jsonl").documents()
    assert (document.title, document.text) == ("Anatomy_Gray", "What is anatomy?")
    parts = {name: item for name, item in PUBLISHED.items() if name.startswith("medcorp_")}
    assert {item.product for item in parts.values()} == {f"medcorp/{name.partition('_')[2]}" for name in parts}


def part(hub: FakeHub, name: str = "part_aa") -> HubFile:
    return hub.repos["datasets/owner/index"][name]


def test_parts_are_joined_gzips_unpacked_and_repositories_fetched_whole(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path
) -> None:
    get("index", "corpus", "checkpoint")
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B
    assert (tmp_path / "wiki.jsonl").read_bytes() == PASSAGES
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"
    assert (tmp_path / "model/nested/weights.bin").read_bytes() == PART_B
    assert (tmp_path / "model/empty").read_bytes() == b""
    assert (tmp_path / "part_aa").exists() and (tmp_path / "wiki.jsonl.gz").exists()
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.unfinished"))


def test_what_is_complete_is_not_asked_for_again(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    get("index", "corpus", "checkpoint")
    hub.asked.clear()
    hub.listings = 0
    get("index", "corpus", "checkpoint")
    assert (hub.asked, hub.listings) == ([], 0)
    (tmp_path / "model/config.json").write_bytes(b"changed")
    get("checkpoint")
    assert hub.asked == [("config.json", 0)]
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"


def test_parts_go_only_when_told_and_are_not_fetched_again(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path
) -> None:
    get("index")
    get("index", "corpus", delete_parts=True)
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")) == [
        "e5_Flat.index",
        "wiki.jsonl",
    ]
    hub.asked.clear()
    get("index", "corpus")
    assert hub.asked == []


def test_a_connection_that_breaks_is_continued(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    part(hub).cuts = [1000, 70_000, 0, 0]
    get("index")
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B
    assert [start for name, start in hub.asked if name == "part_aa"] == [0, 1000, 71_000, 71_000, 71_000]


def test_attempts_that_bring_nothing_are_bounded_and_the_next_run_goes_on(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path
) -> None:
    part(hub).cuts = [5000, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"5000 of 300000 bytes are here\); run again to go on"):
        get("index")
    part(hub).cuts = []
    hub.asked.clear()
    get("index")
    assert hub.asked[0] == ("part_aa", 5000)
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


@pytest.mark.parametrize("chunked", [False, True])
def test_a_server_without_ranges_starts_from_the_front(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path, chunked: bool
) -> None:
    file = part(hub)
    file.ranges, file.chunked, file.cuts = False, chunked, [1000]
    get("index")
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


def test_a_busy_server_is_asked_again(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    hub.listing_statuses = [503]
    part(hub).statuses = [503, 429]
    get("index")
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"served": PART_A[:-1]}, "sends a file of 299999 bytes, expected 300000"),
        ({"served": PART_A + b"x"}, "sends a file of 300001 bytes, expected 300000"),
        ({"served": PART_A + b"x", "chunked": True}, "sends more than the 300000 bytes"),
        ({"served": PART_A[:-1], "chunked": True}, "sends a file of 299999 bytes, expected 300000"),
        ({"served": b"y" * len(PART_A)}, "another checksum"),
        ({"statuses": [404]}, "status 404 Not Found; expected the file"),
        ({"statuses": [403]}, "status 403"),
        ({"statuses": [503] * 9}, "status 503"),
    ],
)
def test_a_wrong_answer_is_named_and_never_put_in_place(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path, fault: dict[str, object], message: str
) -> None:
    hub.repos["datasets/owner/index"]["part_aa"] = HubFile(PART_A, **fault)
    with pytest.raises(DataError, match=message):
        get("index")
    assert not (tmp_path / "part_aa").exists() and not (tmp_path / "e5_Flat.index").exists()
    hub.repos["datasets/owner/index"]["part_aa"] = HubFile(PART_A)
    get("index")
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


def test_a_small_file_is_checked_too(hub: FakeHub, get: Callable[..., None]) -> None:
    hub.repos["models/owner/model"]["config.json"] = HubFile(b"{}", served=b"[]", lfs=False)
    with pytest.raises(DataError, match="another checksum"):
        get("checkpoint")


def test_a_repository_that_is_missing_or_holds_something_else_is_named(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path
) -> None:
    del hub.repos["datasets/owner/index"]["part_ab"]
    with pytest.raises(DataError, match=r"holds no part_ab \(found .gitattributes, part_aa\)"):
        get("index")
    del hub.repos["datasets/owner/corpus"]
    with pytest.raises(DataError, match="dataset owner/corpus: no such repository"):
        get("corpus")
    hub.raw_listing = b"<html>"
    with pytest.raises(DataError, match="the answer is no hub's"):
        get("checkpoint")
    hub.repos["models/owner/model"] = {"../../evil": HubFile(b"x")}
    hub.raw_listing = None
    with pytest.raises(DataError, match="leads out of the folder"):
        get("checkpoint")


def test_no_hub_and_no_permission_to_ask_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="check the network, or set HF_ENDPOINT"):
        list_files("owner/index", "dataset", "http://127.0.0.1:9", FAST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids"):
        list_files("owner/index", "dataset", "http://127.0.0.1:9", FAST)


def test_space_is_checked_before_anything_is_fetched(hub: FakeHub, get: Callable[..., None]) -> None:
    needed = 2 * (len(PART_A) + len(PART_B))
    with pytest.raises(DataError, match=r"e5_Flat.index needs about .* GiB more in"):
        get("index", free_bytes=lambda _: needed - 1)
    assert hub.asked == []
    get("index", free_bytes=lambda _: needed)


def test_a_full_disk_says_so_and_the_next_run_goes_on(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*part_aa.*free some space and run again to go on"):
            get("index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    hub.asked.clear()
    get("index")
    assert 0 < hub.asked[0][1] <= 200_000
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


def test_files_of_another_origin_are_taken_if_right_and_never_replaced(
    hub: FakeHub, get: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "part_aa").write_bytes(PART_A)
    get("index")
    assert [name for name, _ in hub.asked] == ["part_ab"]
    (tmp_path / "wiki.jsonl").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"wiki.jsonl exists, and is not known to be complete"):
        get("corpus")
    assert (tmp_path / "wiki.jsonl").read_bytes() == b"mine"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"config.json exists, and is not the file"):
        get("checkpoint")
    assert (tmp_path / "model/config.json").read_bytes() == b"mine"


def test_an_index_joined_by_hand_is_checked_and_taken(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    index = tmp_path / "e5_Flat.index"
    index.write_bytes(PART_A + PART_B[:-1] + b"?")
    with pytest.raises(DataError, match=r"e5_Flat.index exists, and is not known to be complete"):
        get("index")
    index.write_bytes(PART_A + PART_B)
    get("index")
    assert hub.asked == []


def test_a_new_version_replaces_ours(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    get("checkpoint")
    hub.repos["models/owner/model"]["config.json"] = HubFile(b'{"v": 2}', lfs=False)
    (tmp_path / ".downloads.json").write_text(
        json.dumps({**json.loads((tmp_path / ".downloads.json").read_text()), "items": {}}), "utf-8"
    )
    hub.asked.clear()
    get("checkpoint")
    assert hub.asked == [("config.json", 0)]
    assert (tmp_path / "model/config.json").read_bytes() == b'{"v": 2}'


def test_a_lost_ledger_costs_a_check_but_no_transfer(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    get("index", "checkpoint")
    (tmp_path / ".downloads.json").write_text("{", "utf-8")
    hub.asked.clear()
    get("index", "checkpoint")
    assert hub.asked == []


def test_two_downloads_into_one_folder_are_refused(hub: FakeHub, get: Callable[..., None], tmp_path: Path) -> None:
    part(hub).stall = threading.Event()
    first = threading.Thread(target=get, args=("index",))
    first.start()
    try:
        _wait_for(lambda: bool(hub.asked))
        with pytest.raises(DataError, match="another process downloads into"):
            get("checkpoint")
    finally:
        part(hub).stall.set()
        first.join()
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B


def test_a_partial_file_that_is_too_long_is_started_again(hub: FakeHub, tmp_path: Path) -> None:
    file = next(file for file in list_files("owner/index", "dataset", hub.url, FAST) if file.name == "part_ab")
    target = tmp_path / "part_ab"
    file.partial(target).write_bytes(b"z" * (file.bytes + 1))
    fetch(file, target, FAST)
    assert target.read_bytes() == PART_B


def test_a_file_matches_at_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "joined"
    path.write_bytes(b"aab")
    sha = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"  # of "b"
    file = RemoteFile("b", "", 1, sha)
    assert file.matches(path, 2) and not file.matches(path, 0) and not file.matches(path, 3)
    assert not file.is_at(path)


@pytest.mark.parametrize("there", [b"", b"aaabb", b"aaaXbbZZ", b"X", b"aaabbbb-and-more", b"aaabbbb"])
def test_joining_keeps_only_what_agrees(tmp_path: Path, there: bytes) -> None:
    (tmp_path / "a").write_bytes(b"aaa")
    (tmp_path / "b").write_bytes(b"bbbb")
    (tmp_path / "joined.unfinished").write_bytes(there)
    join([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"aaabbbb"
    assert not (tmp_path / "joined.unfinished").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_broken_gzip_leaves_nothing(tmp_path: Path, damage: str) -> None:
    zipped = gzip.compress(PASSAGES)
    bad = zipped[:-20] if damage == "truncated" else zipped[:-8] + bytes([zipped[-8] ^ 1]) + zipped[-7:]
    (tmp_path / "c.gz").write_bytes(bad)
    with pytest.raises(DataError, match="broken gzip"):
        unzip(tmp_path / "c.gz", tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.gz"]


SLOW_JOIN = """
import sys, time
from pathlib import Path
from verl.retrieval import assemble
assemble._CHUNK = 1000
chunks = assemble._chunks
def slowly(path):
    for number, chunk in enumerate(chunks(path)):
        if number == 3 and path.name == "b":
            print("half", flush=True)
            time.sleep(60)
        yield chunk
assemble._chunks = slowly
a, b, target = map(Path, sys.argv[1:])
assemble.join([a, b], target)
"""


def test_joining_that_was_killed_leaves_no_target_and_goes_on(tmp_path: Path) -> None:
    a, b, target = tmp_path / "a", tmp_path / "b", tmp_path / "joined"
    a.write_bytes(PART_A)
    b.write_bytes(PART_B)
    command = [sys.executable, "-c", SLOW_JOIN, str(a), str(b), str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"half\n"
        child.kill()
    assert not target.exists() and (tmp_path / "joined.unfinished").exists()
    join([a, b], target)
    assert target.read_bytes() == PART_A + PART_B


def test_the_command_is_resumed_after_a_kill(tmp_path: Path) -> None:
    stalled = HubFile(PART_A, stall=threading.Event())
    repos = {
        "datasets/PeterJinGo/wiki-18-e5-index": {"part_aa": stalled, "part_ab": HubFile(PART_B)},
        "datasets/PeterJinGo/wiki-18-corpus": {"wiki-18.jsonl.gz": HubFile(gzip.compress(PASSAGES))},
    }
    with serve(repos) as hub:
        command = [sys.executable, str(ROOT / "scripts/download.py"), "--save_path", str(tmp_path), "--delete_parts"]
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as child:
            _wait_for(lambda: any(file.stat().st_size > 100_000 for file in tmp_path.glob("part_aa.*.partial")))
            child.send_signal(signal.SIGKILL)
        stalled.stall.set()
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert [start > 100_000 for name, start in hub.asked if name == "part_aa"] == [False, True]
        missing = subprocess.run([*command, "--what", "bm25"], env=env, capture_output=True, text=True, timeout=60)
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")) == [
        "e5_Flat.index",
        "wiki-18.jsonl",
    ]
    assert (tmp_path / "e5_Flat.index").read_bytes() == PART_A + PART_B
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines()[-1].startswith("error: dataset PeterJinGo/wiki-18-bm25-index: no such")


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)
