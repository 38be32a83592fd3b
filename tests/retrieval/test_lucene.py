"""Lucene: the formula, the order of ties, Boolean queries, and indexes that were written elsewhere.

Needs the lucene extra and Java, see scripts/install.sh; the tests of what is said without them run anywhere.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_preprocess.scifact import convert
from tests.retrieval.support import open_corpus
from tests.retrieval.test_bm25 import lucene_scores
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval import bm25
from verl.retrieval.collection import open_beir
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import IndexInfo
from verl.retrieval.lucene import LuceneEngine, describe, open_engine, write_index
from verl.retrieval.lucene_jvm import Lucene, lucene
from verl.retrieval.settings import BM25Config, LuceneConfig, LuceneSearch
from verl.types import SearchResult

ROOT = Path(__file__).resolve().parents[2]
SCIFACT = ROOT.parent / "shared" / "data" / "scifact" / "scifact.zip"
BOOLEAN = LuceneSearch(query_syntax="boolean")
Open = Callable[..., LuceneEngine]


@pytest.fixture(scope="module")
def java() -> Lucene:
    try:
        return lucene()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def open_(java: Lucene) -> Iterator[Open]:
    """`open_engine`, for engines that are closed when the test ends."""
    engines: list[LuceneEngine] = []

    def opened(*arguments: Any, **options: Any) -> LuceneEngine:
        engines.append(open_engine(*arguments, **options))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


def write(corpus: Corpus, folder: Path, threads: int = 1, **settings: Any) -> IndexInfo:
    folder.mkdir()
    return write_index(corpus, folder, LuceneConfig(**settings), threads)


def ids(result: SearchResult | RetrieverError) -> list[str]:
    assert isinstance(result, SearchResult), result
    return [document.id for document in result.documents]


def random_corpus(folder: Path, documents: int) -> Corpus:
    """Passages of up to 30 words, few enough for Lucene to keep their lengths exactly; every tenth one is a copy."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    weights = [1 / (rank + 1) for rank in range(60)]
    texts: list[str] = []
    for number in range(documents):
        new = " ".join(rng.choices(words, weights, k=rng.randint(2, 29)))
        texts.append(texts[number // 2] if number % 10 == 9 else new)
    return open_corpus(folder, [(f"d{number}", "title", text) for number, text in enumerate(texts)])


QUERIES = [f"word{a} word{b} word{c}" for a, b, c in ((0, 1, 2), (3, 40, 3), (59, 58, 57), (10, 11, 0), (5, 5, 5))]


@pytest.mark.parametrize("settings", [{}, {"k1": 1.2, "b": 0.75, "stopwords": "none", "stemmer": "none"}])
def test_scores_are_those_of_the_formula(open_: Open, corpus: Corpus, tmp_path: Path, settings: dict[str, Any]) -> None:
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index", **settings))
    for query in ("capital of France", "the river Seine", "planet planet mercury", "liquids"):
        (result,) = engine.search([query], topk=8)
        assert isinstance(result, SearchResult)
        expected = lucene_scores(corpus, query, BM25Config(**settings))
        assert dict(zip(ids(result), result.scores, strict=True)) == pytest.approx(expected, rel=1e-5)
        assert list(result.scores) == sorted(result.scores, reverse=True)


def test_settings_of_the_search_replace_those_of_the_index(open_: Open, corpus: Corpus, tmp_path: Path) -> None:
    info = write(corpus, tmp_path / "index")
    engine = open_(tmp_path / "index", corpus, info, LuceneSearch(k1=2.0, b=0.0))
    (result,) = engine.search(["river Seine"], topk=3)
    assert isinstance(result, SearchResult)
    expected = lucene_scores(corpus, "river Seine", BM25Config(k1=2.0, b=0.0))
    assert dict(zip(ids(result), result.scores, strict=True)) == pytest.approx(expected, rel=1e-5)
    assert engine.info.fingerprint != open_(tmp_path / "index", corpus, info).info.fingerprint
    with pytest.raises(ConfigError, match=r"lucene k1=-1.0, b=0.4; expected a finite k1"):
        open_engine(tmp_path / "index", corpus, info, LuceneSearch(k1=-1.0))


def test_the_bm25_engine_scores_alike(open_: Open, tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path, 300)
    engine = open_(tmp_path / "lucene", corpus, write(corpus, tmp_path / "lucene"))
    (tmp_path / "bm25").mkdir()
    other = bm25.open_engine(tmp_path / "bm25", corpus, bm25.write_index(corpus, tmp_path / "bm25", BM25Config()))
    for found, expected in zip(engine.search(QUERIES, 300), other.search(QUERIES, 300), strict=True):
        assert isinstance(found, SearchResult)
        scores = dict(zip(ids(expected), expected.scores, strict=True))
        assert dict(zip(ids(found), found.scores, strict=True)) == pytest.approx(scores, rel=1e-5)


def test_the_bm25_engine_ranks_real_abstracts_alike(open_: Open, tmp_path: Path) -> None:
    """Lucene rounds the lengths of long documents and cuts words a little differently."""
    if not SCIFACT.is_file():
        pytest.skip(f"{SCIFACT} is not there")
    convert(SCIFACT, tmp_path / "beir")
    lines = (tmp_path / "beir" / "corpus.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:1000]), "utf-8")
    corpus = Corpus.open(tmp_path / "part.jsonl")
    queries = list(open_beir(tmp_path / "beir", "test").queries.values())[:50]
    engine = open_(tmp_path / "lucene", corpus, write(corpus, tmp_path / "lucene", threads=2, store_documents=False))
    (tmp_path / "bm25").mkdir()
    other = bm25.open_engine(tmp_path / "bm25", corpus, bm25.write_index(corpus, tmp_path / "bm25", BM25Config()))
    pairs = zip(engine.search(queries, 10), other.search(queries, 10), strict=True)
    shared = [len({*ids(one)} & {*ids(two)}) / 10 for one, two in pairs]
    assert sum(shared) / len(shared) > 0.95


def test_results_depend_neither_on_batch_threads_segments_nor_topk(open_: Open, tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path, 2100)
    one = open_(tmp_path / "one", corpus, write(corpus, tmp_path / "one"), threads=1)
    info = write(corpus, tmp_path / "several", threads=3)
    assert sum(name.endswith(".si") for name in info.files) > 1
    several = open_(tmp_path / "several", corpus, info, threads=4)
    expected = one.search(QUERIES, topk=50)
    assert several.search(QUERIES, topk=50) == expected
    assert [several.search([query], topk=50)[0] for query in QUERIES] == expected
    assert several.search(QUERIES * 8, topk=50) == expected * 8
    for topk in (1, 7, 49):
        assert [ids(result) for result in several.search(QUERIES, topk)] == [ids(result)[:topk] for result in expected]


def test_equal_scores_come_in_the_order_of_ids(open_: Open, tmp_path: Path) -> None:
    names = ["b", "a", "10", "9", "z", "é", "A", "😀", "\uffee"]
    corpus = open_corpus(tmp_path, [(name, "title", "text") for name in names])
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index"))
    for topk in (1, 4, 9):
        assert ids(engine.search(["text"], topk)[0]) == sorted(names)[:topk]


@pytest.mark.parametrize("topk", [0, -1, 9])
def test_topk_outside_the_corpus_is_refused(open_: Open, corpus: Corpus, tmp_path: Path, topk: int) -> None:
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index"))
    with pytest.raises(RetrieverError, match=rf"topk={topk}"):
        engine.search(["river"], topk=topk)


def test_a_bag_of_words_takes_any_text(open_: Open, corpus: Corpus, tmp_path: Path) -> None:
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index"))
    for query in ("zzz", "the of and", "?!", "", "日本", "\0", '(" AND', "\ud800"):
        assert ids(engine.search([query], topk=3)[0]) == []
    long = "river " + " ".join(f"word{number}" for number in range(5000))
    for query in ("river AND NOT (seine", "\ud800 river seine", 'title:river "SEINE\'s"', long):
        assert ids(engine.search([query], topk=2)[0]) == ["d2", "d0"]


BOOLEAN_QUERIES = [
    ("river AND capital", {"d0"}),
    ("river OR liquid", {"d0", "d2", "d4"}),
    ("river NOT capital", {"d2"}),
    ("river AND NOT capital", {"d2"}),
    ("river OR mercury AND planet", {"d0", "d2", "d3"}),
    ("(river OR mercury) AND (planet OR capital)", {"d0", "d3"}),
    ("river capital AND northern", {"d2"}),
    ('"capital of France"', {"d0"}),
    ('"France of capital"', set()),
    ('"twin passages" OR planet', {"d3", "d5", "d6", "d7"}),
    ("the AND river", {"d0", "d2"}),
    ('"the" AND river', {"d0", "d2"}),
    ("the NOT river", set()),
    ("the of and", set()),
    ("zzz AND river", set()),
    ("plan*", set()),
    ("text/planet", {"d3"}),
    ("/river/ AND [capital TO x]~2^3", {"d0"}),
]


def test_boolean_queries(open_: Open, corpus: Corpus, tmp_path: Path) -> None:
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index"), BOOLEAN)
    results = engine.search([query for query, _ in BOOLEAN_QUERIES], topk=8)
    assert [set(ids(result)) for result in results] == [expected for _, expected in BOOLEAN_QUERIES]
    assert engine.syntax_errors == 0


def test_boolean_queries_find_what_lucenes_own_parser_finds(open_: Open, java: Lucene, tmp_path: Path) -> None:
    """On queries with all their parentheses, which both grammars read alike."""
    import jpype

    corpus, rng = random_corpus(tmp_path, 300), random.Random(1)
    engine = open_(tmp_path / "index", corpus, write(corpus, tmp_path / "index"), BOOLEAN)
    reader = java.DirectoryReader.open(java.FSDirectory.open(java.Paths.get(str(tmp_path / "index" / "lucene"))))
    searcher = java.IndexSearcher(reader)
    searcher.setSimilarity(java.BM25(0.9, 0.4))
    parser = jpype.JClass("org.apache.lucene.queryparser.classic.QueryParser")(
        "contents", java.EnglishAnalyzer.newDefaultInstance()
    )

    def expression(depth: int) -> str:
        if depth == 0:
            return f"word{rng.randrange(12)}"
        parts = [expression(depth - 1) for _ in range(rng.choice([2, 3]))]
        return rng.choice([f"({' AND '.join(parts)})", f"({' OR '.join(parts)})", f"({parts[0]} AND NOT {parts[1]})"])

    queries = [expression(depth) for depth in (1, 2, 3) for _ in range(8)] + ['"word0 word1" AND NOT word2']
    for query, found in zip(queries, engine.search(queries, topk=300), strict=True):
        assert isinstance(found, SearchResult)
        hits = searcher.search(parser.parse(query), 300).scoreDocs
        expected = {str(searcher.doc(hit.doc).get("id")): float(hit.score) for hit in hits}
        assert dict(zip(ids(found), found.scores, strict=True)) == pytest.approx(expected, rel=1e-5)
    assert sum(bool(ids(found)) for found in engine.search(queries, topk=1)) > len(queries) / 2
    reader.close()


def test_a_malformed_boolean_query_is_an_error_of_its_own(open_: Open, corpus: Corpus, tmp_path: Path) -> None:
    info = write(corpus, tmp_path / "index")
    engine = open_(tmp_path / "index", corpus, info, BOOLEAN)
    good, bad = engine.search(["river AND capital", "river AND ("], topk=3)
    assert ids(good) == ["d0"]
    assert isinstance(bad, RetrieverError)
    assert str(bad).startswith("query 'river AND (' is no Boolean query: unexpected end of the query; expected a word")
    lenient = open_(tmp_path / "index", corpus, info, replace(BOOLEAN, on_syntax_error="bag_of_words"))
    assert ids(lenient.search(["river AND ("], topk=3)[0]) == ["d2", "d0"]
    assert (engine.syntax_errors, lenient.syntax_errors) == (1, 1)
    assert lenient.info.fingerprint != engine.info.fingerprint


@pytest.mark.parametrize("store_documents", [True, False])
def test_documents_are_the_corpuss_wherever_they_come_from(open_: Open, tmp_path: Path, store_documents: bool) -> None:
    passages = [
        ("7", 'The "quoted"', "line one\nline two \\ \"x\" 'y'"),
        ("é", "", "no title, 日本 😀"),
        ("c", "only a title", ""),
    ]
    corpus = open_corpus(tmp_path, passages)
    info = write(corpus, tmp_path / "index", store_documents=store_documents)
    engines = [open_(tmp_path / "index", corpus, info)]
    if store_documents:
        engines.append(open_(tmp_path / "index", None, info))
    for engine in engines:
        results = engine.search(["line quoted", "title", "日 😀"], topk=3)
        documents = {
            document for result in results if isinstance(result, SearchResult) for document in result.documents
        }
        assert documents == set(corpus.documents())
    if not store_documents:
        with pytest.raises(ConfigError, match=r"stores no documents; pass its corpus with --corpus_path"):
            open_engine(tmp_path / "index", None, info)


def published(java: Lucene, corpus: Corpus, folder: Path, raw: bool, positions: bool, values: str = "Binary") -> Path:
    """Write an index as pyserini does, without our `index.json`; `values` are the doc values of the ids."""
    import jpype

    def lucene_class(name: str) -> Any:
        return jpype.JClass(f"org.apache.lucene.{name}")

    args = java.GeneratorArgs()
    args.storeRaw, args.storePositions = raw, positions
    generator = java.DocumentGenerator(args)
    settings = java.IndexWriterConfig(java.EnglishAnalyzer.newDefaultInstance())
    writer = java.IndexWriter(java.FSDirectory.open(java.Paths.get(str(folder))), settings)
    for document in corpus.documents():
        made = generator.createDocument(java.JsonDocument.fromFields(document.id, document.contents))
        if values != "Binary":
            made.removeField("id")  # the first is the field, the second its values
            made.removeField("id")
            made.add(lucene_class("document.StringField")("id", document.id, lucene_class("document.Field$Store").YES))
        if values == "Sorted":
            bytes_ = lucene_class("util.BytesRef")(document.id)
            made.add(lucene_class("document.SortedDocValuesField")("id", bytes_))
        writer.addDocument(made)
    writer.close()
    return folder


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("values", ["Binary", "Sorted"])
def test_a_published_index_opens_as_it_is(
    open_: Open, java: Lucene, corpus: Corpus, tmp_path: Path, raw: bool, values: str
) -> None:
    folder = published(java, corpus, tmp_path / "published", raw, positions=False, values=values)
    info = describe(folder, corpus)
    assert (info.retriever, info.documents, info.fingerprint) == ("lucene", 8, corpus.fingerprint)
    own = open_(tmp_path / "own", corpus, write(corpus, tmp_path / "own"))
    engine = open_(folder, corpus, info)
    queries = ["twin lighthouses", "capital of France", "zzz"]
    assert engine.search(queries, topk=8) == own.search(queries, topk=8)
    if raw:
        assert open_(folder, None, describe(folder, None)).search(queries, topk=8) == own.search(queries, topk=8)


def test_an_index_without_positions_refuses_quotes_of_several_words(
    open_: Open, java: Lucene, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published(java, corpus, tmp_path / "published", raw=False, positions=False)
    engine = open_(folder, corpus, describe(folder, corpus), BOOLEAN)
    assert "was built without positions" in caplog.text
    one, several = engine.search(['"rivers" AND seine', '"river Seine" AND paris'], topk=8)
    assert set(ids(one)) == {"d0", "d2"}
    assert isinstance(several, RetrieverError)
    assert 'built without positions, which "river Seine" needs; join the words with AND' in str(several)


def test_an_index_of_another_corpus_is_refused(java: Lucene, corpus: Corpus, tmp_path: Path) -> None:
    folder = published(java, corpus, tmp_path / "published", raw=True, positions=False)
    for name, change, message in (
        ("fewer", lambda passages: passages[:-1], "holds 8 documents, but .* has 7"),
        ("renamed", lambda passages: [*passages[:-1], ("new", "Twin", "A twin")], "holds document 'd7', which corpus"),
        ("edited", lambda passages: [*passages[:-1], ("d7", "Twin", "A twin")], "differ in document 'd7'"),
    ):
        passages = [(document.id, document.title, document.text) for document in corpus.documents()]
        (tmp_path / name).mkdir()
        other = open_corpus(tmp_path / name, change(passages))
        with pytest.raises(DataError, match=message):
            open_engine(folder, other, describe(folder, other))


def test_what_is_no_index_is_refused(java: Lucene, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Lucene index that can be read .*; pass the folder that holds segments_N"):
        describe(tmp_path, corpus)
    folder = published(java, corpus, tmp_path / "published", raw=True, positions=True, values="None")
    with pytest.raises(DataError, match=r"keeps no values of its field 'id'; build it with Anserini"):
        describe(folder, corpus)


def test_a_damaged_index_is_refused(java: Lucene, corpus: Corpus, tmp_path: Path) -> None:
    info = write(corpus, tmp_path / "index")
    bare = replace(info, files={})
    for name in info.files:
        path = tmp_path / "index" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match=r"damaged: .* changed since it was built; build it again with --overwrite"):
            open_engine(tmp_path / "index", corpus, info)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="no Lucene index that can be read"):
            open_engine(tmp_path / "index", corpus, bare)
        path.write_bytes(whole)
    with pytest.raises(DataError, match=r"holds 8 documents, expected 9"):
        open_engine(tmp_path / "index", corpus, replace(info, documents=9))


def test_an_index_that_cannot_be_written_leaves_an_os_error(java: Lucene, corpus: Corpus, tmp_path: Path) -> None:
    from verl.retrieval.lucene_index import write as write_files

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_files(corpus, tmp_path / "file", LuceneConfig(), threads=1)
    long = open_corpus(tmp_path, [("x" * 40_000, "title", "text")])
    with pytest.raises(DataError, match=r"Lucene cannot index .*immense term"):
        write(long, tmp_path / "index")


def test_java_leaves_the_signals_to_python(java: Lucene) -> None:
    script = (
        "import os, signal, time\n"
        "from verl.retrieval.lucene_jvm import lucene\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))\n"
        "lucene()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "told\n"
    assert "KeyboardInterrupt" in done.stderr


NO_JAVA = """
import jpype
def find():
    raise jpype.JVMNotFoundException("none is here")
jpype._core.getDefaultJVMPath = find
"""


@pytest.mark.parametrize(
    ("preparation", "message"),
    [
        ("import sys; sys.modules['pyserini'] = None", "retriever lucene needs the package pyserini"),
        ("import sys; sys.modules['jpype'] = None", "retriever lucene needs the package"),
        (NO_JAVA, "retriever lucene cannot start Java (none is here)"),
    ],
    ids=["pyserini", "jpype", "java"],
)
def test_what_is_missing_is_named_with_the_remedy(
    request: pytest.FixtureRequest, preparation: str, message: str
) -> None:
    if preparation == NO_JAVA:
        request.getfixturevalue("java")
    script = (
        f"{preparation}\n"
        "from verl.errors import ConfigError\n"
        "from verl.retrieval.lucene_jvm import lucene\n"
        "try:\n"
        "    lucene()\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert message in done.stdout
    assert "run `bash scripts/install.sh lucene` and have Java 11 or newer" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": -1.0}, "lucene k1=-1.0"),
        ({"b": 2.0}, "b=2.0"),
        ({"stemmer": "klingon"}, "lucene stemmer='klingon'; expected porter or krovetz or none"),
        ({"query_syntax": "sql"}, "lucene query_syntax='sql'; expected bag_of_words or boolean"),
        ({"on_syntax_error": "ignore"}, "lucene on_syntax_error='ignore'; expected error or bag_of_words"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LuceneConfig(**settings)
