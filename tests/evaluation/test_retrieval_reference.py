"""The reference values of retrieval: against hand-computed ones, and the engine against them."""

from __future__ import annotations

import ast
import json
import math
import random
from pathlib import Path

import pytest

from verl.evaluation import retrieval_reference as reference
from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index

PASSAGES = {"a": "red fox", "b": "red red dog"}


def test_it_shares_no_code_with_the_retriever() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if name.startswith(("verl", "bm25s", "faiss", "data_preprocess"))]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The DOG's running", ["dog", "run"]),
        ("it’s Smith’s, and the dogs'", ["smith", "dog"]),  # "it" is a stop word once its ending is gone
        ("don't", ["don't"]),
        ("version 3.5 of 1,000", ["version", "3.5", "1,000"]),
        ("end. Next 5. 6", ["end", "next", "5", "6"]),
        ("gene-1 tp53 under_score _", ["gene", "1", "tp53", "under_scor"]),
        ("", []),
    ],
)
def test_terms_are_those_of_lucenes_english_analysis(text: str, terms: list[str]) -> None:
    assert reference.terms(text) == terms


def test_bm25_is_the_formula() -> None:
    run = reference.bm25(PASSAGES, {"fox": "foxes", "red": "red", "twice": "red red", "none": "bird"})
    short, long = 0.9 * (0.6 + 0.4 * 2 / 2.5), 0.9 * (0.6 + 0.4 * 3 / 2.5)
    red = {"a": math.log(1.2) / (1 + short), "b": math.log(1.2) * 2 / (2 + long)}
    assert run["fox"] == pytest.approx({"a": math.log(2) / (1 + short)})
    assert run["red"] == pytest.approx(red) and list(run["red"]) == ["b", "a"]
    assert run["twice"] == pytest.approx({id: 2 * value for id, value in red.items()})
    assert run["none"] == {}
    assert list(reference.bm25(PASSAGES, {"red": "red"}, depth=1)["red"]) == ["b"]


def test_measures_count_queries_without_a_hit() -> None:
    qrels = {"one": {"a": 1}, "two": {"b": 1, "c": 1}, "three": {"d": 1}}
    run = {"one": {"x": 2.0, "a": 1.0}, "two": {"b": 1.0}, "three": {}}
    ideal = 1 + 1 / math.log2(3)
    expected = {"ndcg@10": (1 / math.log2(3) + 1 / ideal) / 3, "recall@100": (1 + 0.5) / 3}
    assert reference.score(run, qrels) == pytest.approx(expected)


def test_both_forms_of_a_corpus_are_read(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text('query-id\tcorpus-id\tscore\nq"1\ta\t1\n')
    rows = [{"_id": "a", "title": "T", "text": "one"}, {"id": "b", "contents": '"U"\ntwo'}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"_id": 'q"1', "text": "what"}, {"_id": "other", "text": "not judged"}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    assert reference.read(tmp_path, ["test"]) == reference.Judged(
        {"a": '"T"\none', "b": '"U"\ntwo'}, {'q"1': "what"}, {"test": {'q"1': {"a": 1}}}
    )


def test_our_bm25_is_the_reference_where_words_have_no_marks_inside(tmp_path: Path) -> None:
    chance = random.Random(0)
    words = [f"{stem}{ending}" for stem in ("fish", "walk", "plane", "theor") for ending in ("", "s", "ing", "ies")]
    words += ["the", "of", "a"]
    texts = {f"d{at}": " ".join(chance.choices(words, k=chance.randint(1, 30))) for at in range(200)}
    rows = [{"_id": id, "title": "", "text": text} for id, text in texts.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus.open(tmp_path / "corpus.jsonl")
    build_index(corpus, "bm25", tmp_path / "index")
    queries = {f"q{at}": " ".join(chance.choices(words, k=4)) for at in range(30)}
    expected = reference.bm25(texts, queries, depth=200)
    engine = open_index(tmp_path / "index", corpus, "bm25")
    for query, result in zip(queries, engine.search(list(queries.values()), 200), strict=True):
        found = {document.id: score for document, score in zip(result.documents, result.scores, strict=True)}
        assert found == pytest.approx(expected[query], rel=1e-5)
