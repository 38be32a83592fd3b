"""The cache's commands: figures, export and import as inverses, refusals, pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generator_llms.cache import Entry, ReplyCache
from generator_llms.cache_cli import ModelStats, export_to, import_from, main, stats_by_model
from generator_llms.replies import Completion, ServedModel
from verl.errors import DataError

REPLY = Completion("Paris ü \u2028", 11, 3, "stop", (-0.1, -1e-300)).to_json()


def entry(index: int, model: str = "tiny", used: float = 20.0) -> Entry:
    return Entry(f"{index:064x}", model, REPLY, 10.0, used)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "replies.sqlite"
    cache = ReplyCache(path)
    cache.put_all([*(entry(i) for i in range(1200)), entry(5000, "large", 30.5)])
    cache.put_served("http://here/v1", ServedModel("tiny", None))
    cache.close()
    return path


def contents(path: Path) -> tuple[list[Entry], dict[str, ServedModel]]:
    cache = ReplyCache(path)
    try:
        return list(cache.entries()), cache.all_served()
    finally:
        cache.close()


def test_stats_are_by_model(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ReplyCache(filled)
    size = len(REPLY.encode())
    assert stats_by_model(cache) == {
        "large": ModelStats(1, size, 10.0, 30.5),
        "tiny": ModelStats(1200, 1200 * size, 10.0, 20.0),
    }
    cache.close()
    assert main(["stats", "--path", str(filled)]) == 0
    out = capsys.readouterr().out
    assert "large" in out and "1200" in out and "1201 replies" in out


def test_what_is_exported_comes_back_to_the_bit(filled: Path, tmp_path: Path) -> None:
    copy, lines = tmp_path / "copy.sqlite", tmp_path / "replies.jsonl"
    assert main(["export", "--path", str(filled), "--output", str(lines)]) == 0
    assert main(["import", "--path", str(copy), "--input", str(lines)]) == 0
    assert contents(copy) == contents(filled)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["replies.jsonl"]
    assert not list(tmp_path.glob(".*partial"))


def test_an_import_keeps_what_is_there_and_can_be_repeated(filled: Path, tmp_path: Path) -> None:
    other, lines = ReplyCache(tmp_path / "other.sqlite"), tmp_path / "replies.jsonl"
    other.put(entry(3).key, "tiny", Completion("mine").to_json())
    source = ReplyCache(filled)
    assert export_to(source, lines) == 1201
    source.close()
    assert import_from(other, lines) == (1201, 1200)
    assert import_from(other, lines) == (1201, 0)
    mine = other.get(entry(3).key)
    assert mine is not None and Completion.from_json(mine).text == "mine"
    other.close()


HEADER = {"generator_replies": 2}
GOOD = {"key": "a" * 64, "model": "m", "reply": json.loads(REPLY), "created": 1.0, "used": 2.0}
WRONG: dict[str, Any] = {
    "another schema": [{"generator_replies": 3}],
    "no header": [GOOD],
    "empty": [],
    "not json": [HEADER, "{"],
    "a number": [HEADER, 7],
    "no key": [HEADER, {name: value for name, value in GOOD.items() if name != "key"}],
    "key of another kind": [HEADER, {**GOOD, "key": "A" * 64}],
    "reply without text": [HEADER, {**GOOD, "reply": {"logprobs": []}}],
    "reply of text": [HEADER, {**GOOD, "reply": "Paris"}],
    "unknown field of a reply": [HEADER, {**GOOD, "reply": {**GOOD["reply"], "more": 1}}],
    "time that is none": [HEADER, {**GOOD, "used": "now"}],
    "served model without name": [HEADER, {"endpoint": "x", "max_model_len": 1}],
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_before_anything_is_stored(fault: str, tmp_path: Path) -> None:
    source = tmp_path / "wrong.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in WRONG[fault]]
    good = [json.dumps({**GOOD, "key": f"{i:064x}"}) for i in range(600)]
    source.write_text("".join(f"{line}\n" for line in [*lines[:1], *(good if lines[1:] else []), *lines[1:]]))
    cache = ReplyCache(tmp_path / "c.sqlite")
    with pytest.raises(DataError, match=r"wrong\.jsonl"):
        import_from(cache, source)
    assert cache.count() == 0
    cache.close()


def test_a_wrong_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "wrong.jsonl"
    source.write_text(json.dumps(HEADER) + "\n" + json.dumps(GOOD) + "\n\xff\n", encoding="latin-1")
    assert main(["import", "--path", str(tmp_path / "c.sqlite"), "--input", str(source)]) == 2
    assert "wrong.jsonl:3" in capsys.readouterr().err


def test_an_export_that_fails_leaves_no_file(filled: Path, tmp_path: Path) -> None:
    target = tmp_path / "missing" / "replies.jsonl"
    assert main(["export", "--path", str(filled), "--output", str(target)]) == 2
    cache = ReplyCache(filled)
    cache.put("b" * 64, "tiny", "no json")
    with pytest.raises(ValueError, match="Expecting value"):
        export_to(cache, tmp_path / "replies.jsonl")
    cache.close()
    assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob(".*"))


def test_pruning_by_age_model_and_size(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--path", str(filled), "--model", "large", "--compact"]) == 0
    assert "removed 1 replies, 1200 are left" in capsys.readouterr().out
    assert main(["prune", "--path", str(filled), "--max-bytes", "200000"]) == 0
    left = len(contents(filled)[0])
    assert 0 < left < 1200
    assert main(["prune", "--path", str(filled), "--unused-days", "1"]) == 0  # all were last used in 1970
    assert contents(filled)[0] == []


def test_pruning_nothing_in_particular_is_refused(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--path", str(filled)]) == 2
    assert "--unused-days" in capsys.readouterr().err
    assert len(contents(filled)[0]) == 1201


def test_an_import_of_nothing_creates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--path", str(tmp_path / "c.sqlite"), "--input", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["stats", "prune"])
def test_a_file_that_is_not_there_is_refused_and_not_created(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.sqlite"
    assert main([command, "--path", str(path)]) == 2
    assert "no such file" in capsys.readouterr().err and not path.exists()
