from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess.scifact import convert, main, sentences
from verl.errors import DataError
from verl.retrieval.trec import read_qrels

SCIFACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "scifact" / "scifact.zip"
CORPUS = "doc_id,title,abstract,structured\n"
CLAIMS = "id,claim,evidence_doc_id,evidence_label,evidence_sentences,cited_doc_ids\n"
FILES = {
    "corpus_train.csv": CORPUS + """1,One,"['A b.'\n 'C d.']",False\n2,Two,['E.'],True\n""",
    "claims_train.csv": CLAIMS + "7,Seven,,,[],[2]\n",
    "claims_validation.csv": CLAIMS + "3,Three,1,SUPPORT,[0],[1 2]\n3,Three,2,SUPPORT,[0],[1 2]\n",
    "claims_test.csv": CLAIMS + "9,Nine,,,[],[]\n",
}


def write_zip(folder: Path, changed: Mapping[str, str] | None = None) -> Path:
    path = folder / "scifact.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**FILES, **(changed or {})}.items():
            archive.writestr(name, text)
    return path


@given(st.lists(st.text(max_size=20), min_size=1, max_size=20))
def test_sentences_are_what_numpy_printed(texts: list[str]) -> None:
    assert sentences(str(np.array(texts, dtype=object))) == texts


@pytest.mark.parametrize("text", ["", "['a' b]", "['a', 'b']", "'a'", "['a", "[a]"])
def test_what_is_no_printed_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected quoted sentences in square brackets"):
        sentences(text)


def test_claims_become_queries_and_cited_abstracts_relevant(tmp_path: Path) -> None:
    assert convert(write_zip(tmp_path), tmp_path / "out") == {"documents": 2, "train": 1, "test": 1}
    rows = [json.loads(line) for line in (tmp_path / "out" / "corpus.jsonl").read_text().splitlines()]
    assert rows == [{"_id": "1", "title": "One", "text": "A b. C d."}, {"_id": "2", "title": "Two", "text": "E."}]
    assert read_qrels(tmp_path / "out" / "qrels" / "test.tsv") == {"3": {"1": 1, "2": 1}}
    assert read_qrels(tmp_path / "out" / "qrels" / "train.tsv") == {"7": {"2": 1}}
    queries = [json.loads(line) for line in (tmp_path / "out" / "queries.jsonl").read_text().splitlines()]
    assert queries == [{"_id": "7", "text": "Seven"}, {"_id": "3", "text": "Three"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus_train.csv", CORPUS + "1,One,no array,False\n", "corpus_train.csv, row 1: abstract 'no array'"),
        ("claims_train.csv", CLAIMS + "7,Seven,,,[],[5]\n", "claims_train.csv, row 1: document 5 is not in"),
        ("claims_train.csv", CLAIMS + "7,Seven,,,[],2\n", "claims_train.csv, row 1: cited_doc_ids='2'"),
        ("claims_train.csv", CLAIMS + "7,A,,,[],[2]\n7,B,,,[],[2]\n", "claims_train.csv, row 2: claim 7 has another"),
        ("claims_train.csv", "id,text\n7,A\n", "expected the zip of SciFact's csv files"),
    ],
)
def test_a_bad_row_is_named_and_leaves_nothing(tmp_path: Path, name: str, text: str, message: str) -> None:
    source = write_zip(tmp_path, {name: text})
    with pytest.raises(DataError) as caught:
        convert(source, tmp_path / "out")
    assert message in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scifact.zip"]


def test_another_file_and_a_folder_in_use_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.zip").write_text("no zip")
    for source in ("x.zip", "nowhere.zip"):
        with pytest.raises(DataError, match="expected the zip of SciFact's csv files"):
            convert(tmp_path / source, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["--source", str(write_zip(tmp_path)), "--save_dir", str(tmp_path)])
    assert "is not empty; pass a new folder" in capsys.readouterr().err


@pytest.mark.skipif(not SCIFACT.is_file(), reason="../shared/data/scifact is not there")
def test_the_published_set_has_the_counts_of_beir(tmp_path: Path) -> None:
    assert convert(SCIFACT, tmp_path / "scifact") == {"documents": 5183, "train": 809, "test": 300}
    for split, pairs in (("train", 919), ("test", 339)):
        assert sum(map(len, read_qrels(tmp_path / "scifact" / "qrels" / f"{split}.tsv").values())) == pairs
    rows = [json.loads(line) for line in (tmp_path / "scifact" / "corpus.jsonl").read_text().splitlines()]
    assert all(row["title"] and row["text"] and "\n" not in row["text"] for row in rows)
