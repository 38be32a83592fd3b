"""MIRAGE as a question parquet."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_preprocess import mirage
from data_preprocess.mirage import MirageConfig, build
from data_preprocess.readers.mirage import retrieval_query
from generator_llms.options import chosen_option
from verl.records import read_questions

BENCHMARK = Path(__file__).resolve().parents[3] / "shared" / "data" / "mirage" / "benchmark.json.gz"
PUBLISHED = {"medqa": 1273, "medmcqa": 4183, "pubmedqa": 500, "bioasq": 618, "mmlu": 1089}
SETS = {
    "medqa": {"1": {"question": "Which drug:", "options": {"A": "one", "B": "two"}, "answer": "B"}},
    "mmlu": {
        "anatomy-0": {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "A"},
        "anatomy-1": {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "A"},
    },
}


def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(SETS))
    return path


def test_every_question_stays_as_published(tmp_path: Path) -> None:
    kept = build(MirageConfig(benchmark(tmp_path), tmp_path / "out"))
    assert [(row.source, row.written, row.duplicates) for row in kept] == [("medqa", 1, 0), ("mmlu", 2, 0)]
    questions = read_questions(tmp_path / "out" / "test.parquet")
    assert [question.id for question in questions] == ["medqa/test/1", "mmlu/test/anatomy-0", "mmlu/test/anatomy-1"]
    assert questions[0].text == "Which drug:\nOptions:\nA: one\nB: two"  # no question mark is added
    assert questions[0].answers == ("B: two",)
    assert retrieval_query(questions[0]) == "Which drug:"


def test_subsets_and_samples(tmp_path: Path) -> None:
    path = benchmark(tmp_path)
    (kept,) = build(MirageConfig(path, tmp_path / "one", subsets=("mmlu",), sample=1))
    assert (kept.source, kept.written, kept.unsampled) == ("mmlu", 1, 1)
    with pytest.raises(ValueError, match="subsets is empty"):
        MirageConfig(path, tmp_path, subsets=())
    with pytest.raises(ValueError, match="prompt='s4'; did you mean 's3'"):
        MirageConfig(path, tmp_path, prompt="s4")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zipped = tmp_path / "benchmark.json.gz"
    zipped.write_bytes(gzip.compress(json.dumps(SETS).encode()))
    assert mirage.main([f"path={zipped}", f"output={tmp_path / 'out'}", "prompt=search_r1"]) == 0
    assert "| mmlu | test | 2 |" in capsys.readouterr().out
    assert mirage.main([f"path={zipped}", f"output={tmp_path}", "subsets=[medqu]"]) == 2
    assert "did you mean 'medqa'" in capsys.readouterr().err


def test_the_real_benchmark(tmp_path: Path) -> None:
    if not BENCHMARK.is_file():
        pytest.skip("the MIRAGE benchmark is not here")
    kept = build(MirageConfig(BENCHMARK, tmp_path / "out"))
    assert {row.source: row.written for row in kept} == PUBLISHED
    for question in read_questions(tmp_path / "out" / "test.parquet"):
        assert chosen_option(question.text, question.answers[0]) == question.answers[0]
        assert question.text.startswith(retrieval_query(question) + "\nOptions:\nA: ")
