"""BM25 and MiniLM through the command line beside independently computed values, on real claims and abstracts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_preprocess.scifact import convert
from verl.errors import DataError
from verl.evaluation.retrieval_quality import Compared, check, compare, main, sample, table

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CLAIMS, DOCUMENTS = 40, 120

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first claims of SciFact, the abstracts that answer them, and as many more as make 120."""
    whole = tmp_path_factory.mktemp("scifact") / "whole"
    convert(SHARED / "scifact" / "scifact.zip", whole)
    qrels = (whole / "qrels" / "test.tsv").read_text().splitlines()
    claims = list(dict.fromkeys(line.split("\t")[0] for line in qrels[1:]))[:CLAIMS]
    judged = [line for line in qrels[1:] if line.split("\t")[0] in claims]
    needed = {line.split("\t")[1] for line in judged}
    with (whole / "corpus.jsonl").open() as file:
        lines = list(file)
    lines.sort(key=lambda line: json.loads(line)["_id"] not in needed)
    folder = whole.with_name("small")
    (folder / "qrels").mkdir(parents=True)
    (folder / "qrels" / "test.tsv").write_text("\n".join([qrels[0], *judged]) + "\n")
    (folder / "queries.jsonl").write_text((whole / "queries.jsonl").read_text())
    (folder / "corpus.jsonl").write_text("".join(lines[:DOCUMENTS]))
    return folder


@needs_data
@pytest.mark.integration
def test_bm25_and_minilm_earn_what_they_should_on_claims_of_scifact(small: Path, tmp_path: Path) -> None:
    rows = compare(small, ("test",), ("bm25", "minilm"), tmp_path)
    assert [(row.retriever, row.measure) for row in rows] == [
        ("bm25", "ndcg@10"),
        ("bm25", "recall@100"),
        ("minilm", "ndcg@10"),
        ("minilm", "recall@100"),
    ]
    assert all((row.collection, row.passages, row.queries) == ("small/test", DOCUMENTS, CLAIMS) for row in rows)
    check(rows, 0.01)
    assert all(0.7 < row.reference <= 1.0 for row in rows)
    assert (tmp_path / "runs" / "small-test-minilm" / "run.trec").is_file()


@needs_data
@pytest.mark.integration
def test_the_script_compares_bm25_on_all_of_scifact_with_the_published_value(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "evaluation" / "run_collections.sh"
    chosen = ["retrievers=[bm25]", "splits=[]"]
    environment = {**os.environ, "DATA": str(SHARED), "OUTPUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(script), *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    ndcg, recall = json.loads((tmp_path / "report.json").read_text())
    assert (ndcg["published"], recall["published"]) == (0.6789, 0.9253)
    assert ndcg["reference"] == pytest.approx(0.6789, abs=0.002)  # Lucene rounds the lengths
    assert recall["reference"] == pytest.approx(0.9253, abs=0.0001)
    assert (tmp_path / "summary.md").read_text() in done.stdout


ROW = Compared("scifact/test", 5183, 300, "bm25", "ndcg@10", 0.6769, 0.6777, 0.6789)


def test_a_difference_above_the_tolerance_is_an_error() -> None:
    check([ROW, replace(ROW, ours=0.6876)], 0.01)
    for wrong, off in ((replace(ROW, ours=0.6688), "0.0101"), (replace(ROW, ours=0.66, published=None), "0.0177")):
        with pytest.raises(DataError, match=rf"ndcg@10 of bm25 on scifact/test is {off} off; expected at most 0\.01"):
            check([ROW, wrong], 0.01)
    with pytest.raises(DataError, match="is nan off"):
        check([replace(ROW, ours=float("nan"))], 0.01)


def test_the_table_shows_both_values_and_their_difference() -> None:
    assert table([ROW]).splitlines()[-1] == (
        "| scifact/test | 5,183 | 300 | bm25 | ndcg@10 | 0.6769 | 0.6777 | -0.0008 | 0.6789 |"
    )


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"folder={tmp_path}/none", f"output={tmp_path}/out"]
    assert main(arguments) == 1
    assert "scifact.zip cannot be read" in capsys.readouterr().err
    assert main([*arguments, "~questions", "~passages"]) == 2
    assert "came without sources; name some, or pass splits=[]" in capsys.readouterr().err
    assert main([*arguments, "scifact=null", "splits=[]"]) == 2
    assert "leave nothing to measure" in capsys.readouterr().err


def test_a_sample_of_the_pool_holds_what_is_judged_and_others_from_all_over_it(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    (pool / "qrels").mkdir(parents=True)
    (pool / "corpus.jsonl").write_text("".join(f'{{"id": "{at}", "contents": "\u2028"}}\n' for at in range(10)))
    (pool / "queries.jsonl").write_text('{"_id": "q"}\n')
    for split, passage in (("a", 0), ("b", 7), ("c", 5)):
        (pool / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{passage}\t1\n")
    folder = sample(pool, ["a", "b"], 4, tmp_path / "some")
    assert [json.loads(line)["id"] for line in (folder / "corpus.jsonl").open()] == ["0", "1", "5", "7"]
    assert (folder / "queries.jsonl").read_text() == '{"_id": "q"}\n'
    assert sorted(path.name for path in (folder / "qrels").iterdir()) == ["a.tsv", "b.tsv"]
    for size in (1, 11):
        with pytest.raises(DataError, match=f"pool_size={size}; expected 2, the judged passages, to 10"):
            sample(pool, ["a", "b"], size, tmp_path / "wrong")
