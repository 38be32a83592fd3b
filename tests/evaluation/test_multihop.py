"""Real multi-hop text, end to end: questions, pool, index, service, collecting and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.evaluation.collect import iter_contexts
from verl.evaluation.multihop import MultihopConfig, main
from verl.retrieval.corpus import Corpus
from verl.rewards.recall import title_key

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script's output for 100 questions."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    folder = tmp_path_factory.mktemp("multihop")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/evaluation/run_multihop.sh"), "retrievers=[bm25]", "per_set=50", "topk=[3,8]"],
        env={**os.environ, "DATA": str(SHARED), "OUTPUT": str(folder), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scripted_bm25: 100 of 100 questions at the oracle's ceiling" in done.stdout
    return folder


@pytest.mark.integration
def test_a_scripted_searcher_reaches_the_ceiling_that_the_corpus_allows(output: Path) -> None:
    """The ceiling is counted here from the corpus itself: gold titles that some passage has."""
    there = {title_key(document.title) for document in Corpus.open(output / "pool" / "corpus.jsonl").documents()}
    played = list(iter_contexts(output / "contexts" / "scripted_bm25"))
    assert len(played) == 100
    for context in played:
        gold = {title_key(title) for title in context.trajectory.question.gold_titles}
        found = {title_key(document.title) for document in context.trajectory.documents}
        assert gold & found == gold & there, context.trajectory.question.text
        assert context.trajectory.valid or gold - there, "it stops by itself once it has everything"
    report = json.loads((output / "report.json").read_text())
    assert report["methods"]["scripted_bm25"]["recall"] == report["methods"]["oracle"]["recall"] < 1.0
    assert report["ceiling"]["scripted_bm25"] == {"reached": 100, "n": 100, "below": []}


@pytest.mark.integration
def test_naive_rag_misses_the_second_hop_and_every_figure_has_its_interval(output: Path) -> None:
    methods = json.loads((output / "report.json").read_text())["methods"]
    few, many, ceiling = (methods[name] for name in ("bm25_top3", "bm25_top8", "oracle"))
    assert few["recall"] < many["recall"] < ceiling["recall"] - 0.1
    assert (few["documents"], many["documents"], few["accuracy"]) == (3.0, 8.0, None)
    assert set(few["by_source"]) == {"hotpotqa", "2wikimultihopqa"}
    for figures in (few, *few["by_source"].values()):
        for name in ("recall", "answer_in_context"):
            low, high = figures["intervals"][name]
            assert low < figures[name] < high


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"folder={tmp_path}/none", f"output={tmp_path}/out"]) == 1
    assert "rpt_dev.jsonl" in capsys.readouterr().err
    assert main([f"folder={tmp_path}", f"output={tmp_path}/out", "topk=[0]"]) == 2
    assert "topk of at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="questions is empty"):
        MultihopConfig(tmp_path, tmp_path)
