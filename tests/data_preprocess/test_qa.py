"""Building question parquets: what stays, what is dropped and counted, and that nothing is done twice or by halves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess import qa
from data_preprocess.finished import locked
from data_preprocess.qa import QaConfig, SampleConfig, build, render_prompt
from data_preprocess.qa_select import Kept, sample_positions, wording
from data_preprocess.readers.source import SourceConfig
from verl.agent.grammar.s3 import S3Config, S3Grammar
from verl.config import compose
from verl.errors import ConfigError, DataError
from verl.records import SCHEMA, read_questions
from verl.types import Question


def row(number: int, question: str, answer: Any = "Ada", **more: Any) -> dict[str, Any]:
    answers = answer if isinstance(answer, list) else [answer]
    return {"id": f"r{number}", "question": question, "golden_answers": answers, **more}


def write(path: Path, rows: Iterable[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return str(path)


def source(path: Path, split: str, questions: Iterable[str], **more: Any) -> SourceConfig:
    rows = [row(number, question) for number, question in enumerate(questions)]
    return SourceConfig(path=write(path, rows), split=split, **more)  # type: ignore[arg-type]


def texts(path: Path) -> list[str]:
    return [question.text for question in read_questions(path)]


def test_a_build_from_both_splits(tmp_path: Path) -> None:
    config = QaConfig(
        output=tmp_path / "out",
        sources={
            "nq": source(tmp_path / "a.jsonl", "train", ["who is a", "Who is: A?", "who is b", "who is c"]),
            "hotpotqa": source(tmp_path / "b.jsonl", "train", ["who is b?", "who is d"]),
            "nq_test": source(tmp_path / "c.jsonl", "test", ["who is the C", "who is e"], source="nq"),
        },
    )
    kept = build(config)
    # "Who is: A?" repeats "who is a", "who is c" is tested; "who is b" may stay in both sets.
    assert kept == [
        Kept("nq", "train", read=4, duplicates=1, contaminated=1, written=2),
        Kept("hotpotqa", "train", read=2, written=2),
        Kept("nq", "test", read=2, written=2),
    ]
    train = read_questions(tmp_path / "out" / "train.parquet")
    assert [question.id for question in train] == [
        "nq/train/r0", "nq/train/r2", "hotpotqa/train/r0", "hotpotqa/train/r1",
    ]  # fmt: skip
    assert train[0] == Question("nq/train/r0", "who is a?", ("Ada",), "nq")
    assert texts(tmp_path / "out" / "test.parquet") == ["who is the C?", "who is e?"]
    table = (tmp_path / "out" / "summary.md").read_text()
    assert "| nq | train | 4 | 0 | 1 | 1 | 0 | 2 | 0 | – |" in table


def test_the_published_columns(tmp_path: Path) -> None:
    metadata = {"type": "bridge", "supporting_facts": {"title": ["Mill"], "sent_id": [0]}}
    path = write(tmp_path / "a.jsonl", [row(0, "who?", ["Ada", "A."], metadata=metadata)])
    sources = {"hotpotqa": SourceConfig(path=path, split="train")}
    kept = build(QaConfig(tmp_path / "out", sources, prompt="s3"))
    assert (kept[0].gold_titles, kept[0].kinds) == (1, {"bridge": 1})
    (written,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert list(written) == SCHEMA.names
    assert written["reward_model"] == {
        "style": "rule",
        "ground_truth": {"question": "who?", "target": ["Ada", "A."], "gt_docs": {"title": ["Mill"]}},
    }
    assert (written["data_source"], written["ability"]) == ("hotpotqa", "fact-reasoning")
    assert written["extra_info"] == {"split": "train", "index": 0}
    question = Question("hotpotqa/train/r0", "who?", ("Ada", "A."), "hotpotqa", ("Mill",), kind="bridge")
    assert written["prompt"] == S3Grammar(S3Config()).prompt_messages(question)


@pytest.mark.parametrize("name", ["s3", "search_r1", "search_o1", "ircot", "deepretrieval", "question"])
def test_a_prompt_of_every_protocol_asks_the_question(name: str) -> None:
    rendered = render_prompt(name)(Question("q/test/0", "who is the miller?", ("x",), "q"))
    assert "who is the miller?" in rendered
    assert (rendered == "who is the miller?") == (name == "question")


def test_dropping_can_be_switched(tmp_path: Path) -> None:
    sources = {
        "a": source(tmp_path / "a.jsonl", "train", ["x", "x", "y"]),
        "b": source(tmp_path / "b.jsonl", "train", ["y", "z"]),
        "c": source(tmp_path / "c.jsonl", "validation", ["z"]),
    }
    everything = build(QaConfig(tmp_path / "1", sources, dedupe=False, decontaminate=False))
    assert [kept.written for kept in everything] == [3, 2, 1]
    strict = build(QaConfig(tmp_path / "2", sources, dedupe_across=True))
    assert [(kept.duplicates, kept.contaminated, kept.written) for kept in strict] == [(1, 0, 2), (1, 1, 0), (0, 0, 1)]
    assert texts(tmp_path / "2" / "train.parquet") == ["x?", "y?"]


def test_the_sample_is_that_of_pandas_and_by_split(tmp_path: Path) -> None:
    asked = [f"question {number}?" for number in range(50)]
    sources = {
        "a": source(tmp_path / "a.jsonl", "test", asked),
        "b": source(tmp_path / "b.jsonl", "train", [f"b {number}" for number in range(20)]),
    }
    kept = build(QaConfig(tmp_path / "out", sources, sample=SampleConfig(test=8)))
    assert [(each.source, each.unsampled, each.written) for each in kept] == [("b", 0, 20), ("a", 42, 8)]
    expected = sorted(pd.DataFrame({"q": asked}).sample(8, random_state=42).index)
    assert texts(tmp_path / "out" / "test.parquet") == [asked[index] for index in expected]


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 5))
def test_samples_are_ascending_and_without_repetition(total: int, size: int, seed: int) -> None:
    positions = sample_positions(total, size, seed)
    assert positions == sorted(set(positions)) and len(positions) == min(size, total)
    assert all(0 <= position < total for position in positions)


def test_two_files_of_one_set_are_one_set(tmp_path: Path) -> None:
    first = [row(0, "who?"), row(1, "when?")]
    second = [row(2, "Who"), row(3, "why?")]
    sources = {
        "part1": SourceConfig(path=write(tmp_path / "1.jsonl", first), split="test", source="set"),
        "part2": SourceConfig(path=write(tmp_path / "2.jsonl", second), split="test", source="set"),
    }
    assert build(QaConfig(tmp_path / "out", sources)) == [Kept("set", "test", read=4, duplicates=1, written=3)]
    second[0]["id"] = "r0"
    sources["part2"] = SourceConfig(path=write(tmp_path / "2.jsonl", second), split="test", source="set")
    with pytest.raises(DataError, match=r"id 'set/test/r0' is in .*part1.parquet and in .*part2.parquet"):
        build(QaConfig(tmp_path / "again", sources))


BAD = {
    "no answers": ({"id": "r1", "question": "q"}, "of no known format|golden_answers is missing"),
    "empty answers": (row(1, "q", []), r"golden_answers is \[\]; expected at least one answer"),
    "lists of answers": (row(1, "q", [["Ada"]]), r"which holds \['Ada'\] \(list\)"),
    "no JSON": ('{"id": ', "not JSON"),
    "an id again": (row(0, "another"), r"id 'a/test/r0' was used at .*rows.jsonl:1; ids must be unique"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_stops_or_is_counted(tmp_path: Path, name: str) -> None:
    bad, message = BAD[name]
    path = tmp_path / "rows.jsonl"
    sources = {"a": SourceConfig(path=write(path, [row(0, "who?"), bad, row(2, "why?")]), split="test")}
    with pytest.raises(DataError, match=message) as error:
        build(QaConfig(tmp_path / "out", sources))
    assert f"{path}:2: " in str(error.value) and "on_error=skip" in str(error.value)
    assert not list((tmp_path / "out").rglob("*.parquet")) and not list((tmp_path / "out").rglob("*.partial"))
    assert build(QaConfig(tmp_path / "out", sources, on_error="skip")) == [
        Kept("a", "test", read=3, malformed=1, written=2)
    ]


def test_wrong_configurations() -> None:
    with pytest.raises(ValueError, match="did you mean 'search_r1'"):
        QaConfig(Path("x"), prompt="searchr1")
    with pytest.raises(ValueError, match="limit=0"):
        QaConfig(Path("x"), limit=0)
    with pytest.raises(ValueError, match="test=0"):
        SampleConfig(test=0)
    with pytest.raises(ConfigError, match="sources is empty"):
        build(QaConfig(Path("x")))
    with pytest.raises(ConfigError, match=r"sources.nq.split is missing; expected train, validation, test"):
        build(QaConfig(Path("x"), {"nq": SourceConfig()}))


def test_sources_without_a_usable_question(tmp_path: Path) -> None:
    passages = write(tmp_path / "corpus.jsonl", [{"title": "Mill", "text": "A mill."}])
    with pytest.raises(DataError, match="holds no question that can be used"):
        build(QaConfig(tmp_path / "out", {"a": SourceConfig(path=passages, split="test")}))
    sources = {"a": source(tmp_path / "a.jsonl", "train", ["x"]), "b": source(tmp_path / "b.jsonl", "test", ["X?"])}
    with pytest.raises(DataError, match="no question of the split train is left"):
        build(QaConfig(tmp_path / "out", sources))


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = qa.read_source

    def counted(key: str, *arguments: Any) -> Any:
        read.append(key)
        return original(key, *arguments)

    monkeypatch.setattr(qa, "read_source", counted)
    sources = {"a": source(tmp_path / "a.jsonl", "train", ["x"]), "b": source(tmp_path / "b.jsonl", "test", ["y"])}
    config = QaConfig(tmp_path / "out", sources)
    first = build(config)
    stamp = (tmp_path / "out" / "train.parquet").stat().st_mtime_ns
    assert build(config) == first
    assert read == ["a", "b"] and (tmp_path / "out" / "train.parquet").stat().st_mtime_ns == stamp

    # Another seed selects anew but reads nothing; another file is read, and only that one.
    build(QaConfig(tmp_path / "out", sources, seed=1))
    assert read == ["a", "b"]
    sources["b"] = source(tmp_path / "b.jsonl", "test", ["y", "longer"])
    build(QaConfig(tmp_path / "out", sources))
    assert read == ["a", "b", "b"]
    assert texts(tmp_path / "out" / "test.parquet") == ["y?", "longer?"]


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"a": source(tmp_path / "a.jsonl", "train", ["x"]), "b": source(tmp_path / "b.jsonl", "test", ["y"])}
    config = QaConfig(tmp_path / "out", sources)
    build(config)
    expected = (tmp_path / "out" / "test.parquet").read_bytes()

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qa, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            build(QaConfig(tmp_path / "out", sources, seed=3))
    assert not (tmp_path / "out" / "build.json").exists()
    build(config)
    assert (tmp_path / "out" / "test.parquet").read_bytes() == expected


def test_one_build_at_a_time(tmp_path: Path) -> None:
    config = QaConfig(tmp_path / "out", {"a": source(tmp_path / "a.jsonl", "train", ["x"])})
    with locked(tmp_path / "out"), pytest.raises(DataError, match="is being written by another process"):
        build(config)


def test_training_on_a_question_that_is_tested_with_options(tmp_path: Path) -> None:
    choice = {"medqa": {"1": {"question": "Does it help", "options": {"A": "yes", "B": "no"}, "answer": "A"}}}
    sources = {
        "pubmedqa": source(tmp_path / "a.jsonl", "train", ["does it help?", "is it old?"]),
        "mirage": SourceConfig(path=write(tmp_path / "b.json", [choice]), split="test"),
    }
    assert [(kept.source, kept.contaminated) for kept in build(QaConfig(tmp_path / "out", sources))] == [
        ("pubmedqa", 1), ("medqa", 0),
    ]  # fmt: skip


def test_the_limit_reads_so_many_rows(tmp_path: Path) -> None:
    sources = {"a": source(tmp_path / "a.jsonl", "test", [f"q{n}" for n in range(9)])}
    assert build(QaConfig(tmp_path / "out", sources, limit=4))[0].read == 4


@given(st.text(min_size=1).filter(lambda text: text.strip()))
def test_wording_forgives_case_and_punctuation(text: str) -> None:
    def key(asked: str) -> bytes:
        return wording(Question("q/t/0", asked, ("a",), "q"))

    assert key(text) == key(f"  {text}  ")
    assert key("What is the  U.S. Navy?") == key("what is U.S. navy") != key("what is a mill")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [row(0, "who?")])
    arguments = [f"output={tmp_path / 'out'}", f"sources.wiki2.path={path}", "sources.wiki2.source=2wikimultihopqa"]
    assert qa.main([*arguments, "sources.wiki2.split=test"]) == 0
    assert "| 2wikimultihopqa | test | 1 |" in capsys.readouterr().out
    assert qa.main(arguments) == 2
    assert "sources.wiki2.split is missing" in capsys.readouterr().err
    assert qa.main([*arguments, "sources.wiki2.split=tset"]) == 2
    assert "did you mean 'test'" in capsys.readouterr().err
    assert compose("qa", [f"output={tmp_path}"], QaConfig) == QaConfig(tmp_path)  # the YAML changes nothing
