"""Pooling passages: each once, known by what it says, and the questions' gold passages with it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess import pooled_corpus
from data_preprocess.pool import Pool, passage_id
from data_preprocess.pooled_corpus import PoolConfig, Pooled, pool_corpus
from data_preprocess.readers.source import SourceConfig
from tests.data_preprocess.test_readers import HOTPOT, MIRAGE, MUSIQUE, SHARED, STRATEGY
from verl.errors import ConfigError, DataError
from verl.retrieval.collection import open_beir
from verl.retrieval.corpus import Corpus
from verl.types import Document


def source(path: Path, *rows: Any, **more: Any) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path), **more)


def passages(path: Path) -> dict[str, Document]:
    return {document.id: document for document in Corpus.open(path).documents()}


def test_pages_in_several_cuts_stand_once(tmp_path: Path) -> None:
    again = {**HOTPOT, "_id": "other", "context": [["mill", [" A  mill!"]], ["Mill", ["Another cut."]]]}
    output = tmp_path / "pool" / "corpus.jsonl"
    sources = {"hotpotqa": source(tmp_path / "a.jsonl", HOTPOT), "again": source(tmp_path / "b.jsonl", again)}
    assert pool_corpus(PoolConfig(output, sources)) == [
        Pooled("hotpotqa", passages=3, added=3, malformed=0, questions=1, with_titles=1, complete=1),
        Pooled("again", passages=2, added=1, malformed=0, questions=1, with_titles=1, complete=1),
    ]
    first = json.loads(output.read_text().splitlines()[0])
    assert first == {"id": passage_id("Ada", "Ada was born. She runs a mill."),
                     "contents": '"Ada"\nAda was born. She runs a mill.'}  # fmt: skip
    pool = passages(output)
    assert [(page.title, page.text) for page in pool.values()] == [
        ("Ada", "Ada was born. She runs a mill."), ("Mill", "A mill."), ("Rye", "A town."), ("Mill", "Another cut."),
    ]  # fmt: skip
    collection = open_beir(output.parent)
    assert collection.queries == {"hotpotqa/test/5a8b": "Who runs the mill?", "again/test/other": "Who runs the mill?"}
    gold = {question: {pool[id].text for id in judged} for question, judged in collection.qrels.items()}
    assert gold["hotpotqa/test/5a8b"] == {"Ada was born. She runs a mill.", "A mill."}
    assert gold["again/test/other"] == {"A mill.", "Another cut."}
    assert "| all | 5 | 4 | 0 | 2 | 2 | 2 (100.0 %) |" in (output.parent / "summary.md").read_text()


def test_gold_passages_in_a_file_of_their_own(tmp_path: Path) -> None:
    paragraphs = tmp_path / "paragraphs.jsonl"
    rows = [("Mill, North", 12, "An old mill."), ("Mill, North", 13, "Its roof."), ("Ada", 1, "Born later.")]
    paragraphs.write_text("".join(
        json.dumps({"id": f"p{n}", "title": title, "para_index": index, "contents": text}) + "\n"
        for n, (title, index, text) in enumerate(rows)
    ))  # fmt: skip
    config = source(tmp_path / "a.jsonl", STRATEGY, {**STRATEGY, "qid": "x", "evidence": [[["Elsewhere-1"]]]})
    config = SourceConfig(path=config.path, passages=paragraphs)
    (pooled,) = pool_corpus(PoolConfig(tmp_path / "out" / "corpus.jsonl", {"strategyqa": config}))
    assert (pooled.passages, pooled.added, pooled.with_titles, pooled.complete) == (3, 3, 2, 1)
    pool = passages(tmp_path / "out" / "corpus.jsonl")
    (judged,) = open_beir(tmp_path / "out").qrels.values()
    assert [pool[id].text for id in judged] == ["An old mill.", "Born later."]
    assert open_beir(tmp_path / "out", "strategyqa-test").qrels == open_beir(tmp_path / "out", "test").qrels


def test_long_passages_are_cut_and_stay_gold(tmp_path: Path) -> None:
    text = "One two three. Four five six. Seven eight."
    row = {**MUSIQUE, "paragraphs": [{"idx": 0, "title": "Ada", "paragraph_text": text, "is_supporting": True}]}
    output = tmp_path / "corpus.jsonl"
    (pooled,) = pool_corpus(PoolConfig(output, {"musique": source(tmp_path / "a.jsonl", row)}, words=3))
    assert (pooled.passages, pooled.added) == (1, 3)
    (judged,) = open_beir(tmp_path).qrels.values()
    assert [passages(output)[id].text for id in judged] == ["One two three.", "Four five six.", "Seven eight."]


def test_options_are_no_part_of_a_query(tmp_path: Path) -> None:
    sources = {
        "mirage": source(tmp_path / "a.json", MIRAGE),
        "corpus": source(tmp_path / "b.jsonl", {"title": "T", "text": "x"}),
    }
    pool_corpus(PoolConfig(tmp_path / "out" / "corpus.jsonl", sources))
    queries = [json.loads(line) for line in (tmp_path / "out" / "queries.jsonl").read_text().splitlines()]
    assert [query["text"] for query in queries] == ["Which drug?", "Does it?"]


@given(st.text(), st.text())
def test_ids_follow_from_what_a_passage_says(title: str, text: str) -> None:
    assert passage_id(title, text) == passage_id(f" {title} ", f" {text}\n")
    pool = Pool(io.StringIO())
    added = [pool.add(Document(id, title, text)) for id in ("a", "b")]
    assert added[0] == added[1] and len(pool) == len(added[0]) == bool(title.strip() or text.strip())


def test_other_passages_have_other_ids() -> None:
    assert passage_id("Mill", "A mill.") == passage_id("mill", "mill") != passage_id("Mill", "A mile.")
    assert passage_id("A B", "C") != passage_id("A", "B C")
    assert passage_id("!", "?") != passage_id("?", "!")


def test_nothing_is_done_twice_and_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "out" / "corpus.jsonl"
    config = PoolConfig(output, {"a": source(tmp_path / "a.jsonl", HOTPOT)})
    first = pool_corpus(config)
    stamp = output.stat().st_mtime_ns
    assert pool_corpus(config) == first and output.stat().st_mtime_ns == stamp

    bad = PoolConfig(output, {"a": source(tmp_path / "a.jsonl", HOTPOT, {**HOTPOT, "answer": ""})})
    with pytest.raises(DataError, match=r"a.jsonl:2: answer is ''"):
        pool_corpus(bad)
    assert len(passages(output)) == 3 and not list(output.parent.glob(".pooling-*"))
    (pooled,) = pool_corpus(PoolConfig(output, bad.sources, on_error="skip"))
    assert (pooled.malformed, pooled.questions) == (1, 1)


def test_bad_input(tmp_path: Path) -> None:
    output = tmp_path / "out" / "corpus.jsonl"
    with pytest.raises(ConfigError, match="sources is empty"):
        pool_corpus(PoolConfig(output))
    with pytest.raises(ValueError, match="words=-1"):
        PoolConfig(output, words=-1)
    bare = {"a": source(tmp_path / "a.jsonl", {"question": "q", "answer": ["x"]})}
    with pytest.raises(DataError, match="sources a ship no passages"):
        pool_corpus(PoolConfig(output, bare))
    twice = {"a": source(tmp_path / "a.jsonl", HOTPOT, HOTPOT)}
    with pytest.raises(DataError, match=r"a.jsonl:2: id 'a/test/5a8b' was used before"):
        pool_corpus(PoolConfig(output, twice))


def test_the_command_line_on_the_real_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    arguments = [f"output={tmp_path}/corpus.jsonl", f"sources.hotpotqa.path={SHARED}/hotpotqa/rpt_dev.jsonl"]
    arguments += [f"sources.strategyqa.path={SHARED}/strategyqa/migres_dev229.jsonl"]
    arguments += [f"sources.strategyqa.passages={SHARED}/strategyqa/migres_evidence_paragraphs998.jsonl"]
    assert pooled_corpus.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| hotpotqa | 2,987 | 2,966 | 0 | 300 | 300 | 300 (100.0 %) |" in table
    assert "229 (100.0 %)" in table
    assert len(Corpus.open(tmp_path / "corpus.jsonl")) == 3963
