from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.retrieval.support import PASSAGES, open_corpus
from verl.errors import ConfigError, DataError
from verl.retrieval.build import BuildOptions, build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import IndexInfo, open_index
from verl.retrieval.settings import BM25Config


def test_bm25_is_built_and_opened_from_the_folder_or_a_file_in_it(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "indexes" / "bm25"
    info = build_index(corpus, "bm25", target)
    assert (info.retriever, info.model, info.documents, info.fingerprint) == ("bm25", None, 8, corpus.fingerprint)
    assert IndexInfo.load(target).same_as(info)
    for path in (target, target / "index.json"):
        engine = open_index(path, corpus, "bm25")
        assert engine.info.name == "bm25"
        assert engine.search(["river"], 1)[0].documents[0].id == "d2"
    assert [entry.name for entry in target.parent.iterdir()] == ["bm25"], "nothing unfinished may stay behind"


def test_dense_is_built_and_opened(corpus: Corpus, tiny_bert: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(tiny_bert), encoder=EncoderConfig(device="cpu"))
    build_index(corpus, "bge", tmp_path / "index", options)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["bge_Flat.index", "index.json"]
    engine = open_index(tmp_path / "index" / "bge_Flat.index", corpus, "bge")
    assert engine.info.name == "bge" and len(engine.search(["river"], 8)[0].documents) == 8


def test_an_index_for_another_corpus_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    build_index(corpus, "bm25", tmp_path / "index")
    (tmp_path / "other").mkdir()
    other = open_corpus(tmp_path / "other", [*PASSAGES[:-1], ("d7", "Twin", "A twin passage about lighthouses!")])
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "index", other, "bm25")
    message = str(caught.value)
    assert "was built for another corpus" in message and "\n" not in message
    assert corpus.fingerprint[:12] in message and other.fingerprint[:12] in message and str(other.path) in message


def test_an_index_of_another_retriever_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    build_index(corpus, "bm25", tmp_path / "index")
    with pytest.raises(ConfigError, match="built for retriever 'bm25', but retriever_name='e5'"):
        open_index(tmp_path / "index", corpus, "e5")


@pytest.mark.parametrize("name", ["bm26", "", "E5"])
def test_an_unknown_retriever_is_refused(corpus: Corpus, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of bm25, e5, bge, minilm"):
        build_index(corpus, name, tmp_path / "index")
    with pytest.raises(ConfigError, match="expected one of bm25, e5, bge, minilm"):
        open_index(tmp_path, corpus, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "holds no index.json"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"retriever": "bm25", "model": null, "fingerprint": "x", "documents": 8, "format": 99}', "has format 99"),
    ],
)
def test_a_folder_without_a_readable_index_says_how_to_build_one(
    corpus: Corpus, tmp_path: Path, text: str | None, reason: str
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    if text is not None:
        (folder / "index.json").write_text(text, "utf-8")
    with pytest.raises(DataError, match=rf"{reason}.*python -m verl.retrieval.build"):
        open_index(folder, corpus, "bm25")
    with pytest.raises(DataError, match="no such file or folder"):
        open_index(tmp_path / "nowhere", corpus, "bm25")


def test_the_same_index_is_kept_another_is_only_replaced_when_told(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(corpus, "bm25", target)
    mark = target / "mark"
    mark.touch()
    build_index(corpus, "bm25", target)
    assert mark.exists(), "an index that is what was asked for is not built again"
    changed = BuildOptions(bm25=BM25Config(k1=1.2))
    with pytest.raises(ConfigError, match=r"holds another index.*'k1': 0.9.*'k1': 1.2.*--overwrite"):
        build_index(corpus, "bm25", target, changed)
    assert IndexInfo.load(target).settings["k1"] == 0.9
    build_index(corpus, "bm25", target, BuildOptions(bm25=BM25Config(k1=1.2), overwrite=True))
    assert IndexInfo.load(target).settings["k1"] == 1.2 and not mark.exists()


def test_a_folder_that_holds_something_else_is_never_touched(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="holds something that is no index"):
        build_index(corpus, "bm25", target, BuildOptions(overwrite=True))
    assert (target / "thesis.txt").read_text("utf-8") == "years of work"


def test_a_build_that_fails_leaves_nothing(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_index(corpus, "e5", tmp_path / "out" / "index", BuildOptions(model=str(tmp_path / "no model")))
    assert list((tmp_path / "out").iterdir()) == []


def test_no_threads_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads=0; expected at least 1"):
        open_index(tmp_path, corpus, "bm25", threads=0)


def test_a_model_for_bm25_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bm25, which has no model"):
        build_index(corpus, "bm25", tmp_path / "index", BuildOptions(model="intfloat/e5-base-v2"))


def test_the_engine_analyses_queries_as_the_index_was_built(corpus: Corpus, tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(corpus, "bm25", target, BuildOptions(bm25=BM25Config(stemmer="none")))
    assert json.loads((target / "index.json").read_text("utf-8"))["settings"]["stemmer"] == "none"
    assert open_index(target, corpus, "bm25").search(["rivers"], 1)[0].documents == ()
