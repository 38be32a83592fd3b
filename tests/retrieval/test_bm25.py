from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bm25s
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, open_corpus
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.bm25 import BM25Engine, open_engine, write_index
from verl.retrieval.bm25_analysis import Analyzer
from verl.retrieval.bm25_build import BlockSize, build
from verl.retrieval.corpus import Corpus
from verl.retrieval.settings import BM25Config


def make_engine(corpus: Corpus, folder: Path, config: BM25Config | None = None) -> BM25Engine:
    folder.mkdir()
    return open_engine(folder, corpus, write_index(corpus, folder, config or BM25Config()))


@pytest.fixture
def engine(corpus: Corpus, tmp_path: Path) -> BM25Engine:
    return make_engine(corpus, tmp_path / "index")


def lucene_scores(corpus: Corpus, query: str, config: BM25Config) -> dict[str, float]:
    """BM25 as Lucene computes it (Kamphuis et al. 2020, table 1, "Lucene (accurate)"), less the constant k1 + 1."""
    analyze = Analyzer(config)
    terms = {document.id: Counter(analyze(document.contents)) for document in corpus.documents()}
    lengths = {id: sum(counts.values()) for id, counts in terms.items()}
    average = sum(lengths.values()) / len(lengths)
    scores: dict[str, float] = {}
    for term in analyze(query):
        holders = sum(term in counts for counts in terms.values())
        weight = math.log(1 + (len(terms) - holders + 0.5) / (holders + 0.5))
        for id, counts in terms.items():
            if term in counts:
                norm = config.k1 * (1 - config.b + config.b * lengths[id] / average)
                scores[id] = scores.get(id, 0.0) + weight * counts[term] / (counts[term] + norm)
    return scores


@pytest.mark.parametrize("config", [BM25Config(), BM25Config(k1=1.5, b=0.75, stopwords="none", stemmer="english")])
def test_scores_are_lucenes(corpus: Corpus, tmp_path: Path, config: BM25Config) -> None:
    engine = make_engine(corpus, tmp_path / "index", config)
    for query in ("capital of France", "the river Seine", "planet planet mercury", "liquids"):
        (result,) = engine.search([query], topk=8)
        expected = lucene_scores(corpus, query, config)
        assert dict(zip((d.id for d in result.documents), result.scores, strict=True)) == pytest.approx(
            expected, abs=1e-5
        )
        assert list(result.scores) == sorted(result.scores, reverse=True)


def test_equal_scores_come_in_corpus_order_and_a_smaller_topk_is_the_head(engine: BM25Engine) -> None:
    (all_of_them,) = engine.search(["twin lighthouses"], topk=8)
    assert [document.id for document in all_of_them.documents] == ["d5", "d6", "d7"]
    for topk in (1, 2):
        (head,) = engine.search(["twin lighthouses"], topk=topk)
        assert head.documents == all_of_them.documents[:topk] and head.scores == all_of_them.scores[:topk]


def test_a_query_alone_and_in_a_batch_is_the_same(engine: BM25Engine) -> None:
    queries = [f"{title} {text[:20]}" for _, title, text in PASSAGES] + ["zzz", "the", "capital"]
    batch = engine.search(queries, topk=5)
    assert batch == [engine.search([query], topk=5)[0] for query in queries]
    assert [result.query for result in batch] == queries


@pytest.mark.parametrize("query", ["zzz", "the of and", "?!", "日本"])
def test_a_query_without_an_indexed_term_has_no_hits(engine: BM25Engine, query: str) -> None:
    (result,) = engine.search([query], topk=3)
    assert result.documents == () and result.scores == ()


@pytest.mark.parametrize("topk", [0, -1, 9])
def test_topk_outside_the_corpus_is_refused(engine: BM25Engine, topk: int) -> None:
    with pytest.raises(RetrieverError, match=rf"topk={topk}"):
        engine.search(["river"], topk=topk)


@pytest.mark.parametrize(
    ("config", "terms"),
    [
        (BM25Config(), ["obama", "wife", "citi", "x"]),
        (BM25Config(stemmer="none"), ["obama", "wife", "cities", "x"]),
        (BM25Config(stopwords="none"), ["obama", "wife", "and", "the", "citi", "x"]),
        (BM25Config(stopwords="Wife, x"), ["obama", "and", "the", "citi"]),
    ],
)
def test_analysis(config: BM25Config, terms: list[str]) -> None:
    assert Analyzer(config)("Obama’s wife, and the CITIES (X)") == terms


@pytest.mark.parametrize(
    "settings_",
    [
        {"k1": -1.0},
        {"b": 1.1},
        {"b": math.nan},
        {"stopwords": "klingon"},
        {"stopwords": " , "},
        {"k1": math.inf},
        {"stemmer": "klingon"},
    ],
)
def test_wrong_settings_are_refused(settings_: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings_))):
        Analyzer(BM25Config(**settings_))


def test_a_corpus_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no indexable word"):
        write_index(open_corpus(tmp_path, [("a", "?", "!!")]), tmp_path, BM25Config())


def test_a_damaged_index_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    info = write_index(corpus, tmp_path, BM25Config())
    data = tmp_path / "bm25" / "data.csc.index.npy"
    whole = data.read_bytes()
    for damaged in (whole[:60], whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        data.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.*data.csc.index.npy changed.*build it again with --overwrite"):
            open_engine(tmp_path, corpus, info)
    data.unlink()
    with pytest.raises(DataError, match=r"damaged.*build it again with --overwrite"):
        open_engine(tmp_path, corpus, info)


@pytest.mark.parametrize("name", ["data", "indices", "indptr", "vocab", "params"])
def test_an_index_without_marks_is_checked_by_its_sizes(corpus: Corpus, tmp_path: Path, name: str) -> None:
    info = replace(write_index(corpus, tmp_path, BM25Config()), files={})
    assert open_engine(tmp_path, corpus, info).search(["river"], topk=1)[0].documents
    (path,) = (tmp_path / "bm25").glob(f"{name}.*")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"damaged.*build it again with --overwrite"):
        open_engine(tmp_path, corpus, info)


def bm25s_files(corpus: Corpus, config: BM25Config, folder: Path) -> dict[str, bytes]:
    """What bm25s itself writes when it is given the terms of all documents at once."""
    analyze, vocabulary = Analyzer(config), {}
    documents = [
        [vocabulary.setdefault(term, len(vocabulary)) for term in analyze(document.contents)]
        for document in corpus.documents()
    ]
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
    index.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    index.save(str(folder), show_progress=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WORDS = ["running", "runs", "the", "of", "Seine's", "été", "x", "42", "?", "of the"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.builds(BM25Config, k1=st.floats(0, 3), b=st.floats(0, 1), stopwords=st.sampled_from(["english", "none", "x,y"])),
    st.builds(BlockSize, documents=st.integers(1, 5), entries=st.integers(1, 20)),
)
def test_the_files_are_those_that_bm25s_writes(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], config: BM25Config, size: BlockSize
) -> None:
    folder = tmp_path_factory.mktemp("index")
    corpus = open_corpus(folder, [(str(at), "running", text) for at, text in enumerate(texts)])
    build(corpus, folder / "ours", config, workers=1, size=size)
    ours = {path.name: path.read_bytes() for path in (folder / "ours").iterdir()}
    assert ours == bm25s_files(corpus, config, folder / "theirs")
    assert {path.name for path in folder.iterdir()} == {"corpus.jsonl", "corpus.jsonl.cache", "ours", "theirs"}
    shutil.rmtree(folder)


def test_several_processes_write_the_same_files(tmp_path: Path) -> None:
    corpus = open_corpus(tmp_path, [(f"d{at}", f"title {at % 7}", f"word{at % 11} and {at}") for at in range(100)])
    files = []
    for workers in (1, 2):
        build(corpus, tmp_path / str(workers), BM25Config(), workers, BlockSize(documents=9))
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()})
    assert files[0] == files[1]


def test_no_worker_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers=0; expected at least 1"):
        write_index(corpus, tmp_path, BM25Config(), workers=0)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), st.integers(1, 12))
def test_results_are_the_sorted_scores_of_bm25s(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str, topk: int
) -> None:
    folder = tmp_path_factory.mktemp("index")
    corpus = open_corpus(folder, [(str(at), "running", text) for at, text in enumerate(texts)])
    engine = make_engine(corpus, folder / "index", BM25Config(stopwords="none"))
    topk = min(topk, len(corpus))
    index = bm25s.BM25.load(str(folder / "index" / "bm25"))
    terms = [term for term in Analyzer(BM25Config(stopwords="none"))(query) if term in index.vocab_dict]
    scores = index.get_scores(terms).tolist() if terms else []
    hits = sorted((-score, str(row)) for row, score in enumerate(scores) if score > 0)[:topk]
    for _ in range(2):  # the engine is as good as new after a search
        (result,) = engine.search([query], topk)
        assert [(-score, doc.id) for doc, score in zip(result.documents, result.scores, strict=True)] == hits
    shutil.rmtree(folder)
