from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import Stemmer

from data_preprocess.scifact import convert
from tests.retrieval.support import PASSAGES, write_jsonl
from tests.retrieval.test_rerank import write_cross_encoder
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.collection import Collection, open_beir
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import open_index
from verl.retrieval.evaluate import EvaluationConfig, System, main, measures_of, search_collection
from verl.retrieval.measures import MEASURES
from verl.retrieval.rerank import CrossEncoderReranker
from verl.retrieval.trec import read_run
from verl.types import SearchResult

SCIFACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "scifact" / "scifact.zip"
QUERIES = {"q1": "capital of France", "q2": "swift planet", "q3": "xylophone", "d2": "river in France"}
QRELS = {"q1": "d0", "q2": "d3", "q3": "d7", "d2": "d2"}


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beir") / "tiny"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": id, "title": title, "text": text} for id, title, text in PASSAGES])
    write_jsonl(folder / "queries.jsonl", [{"_id": id, "text": text} for id, text in QUERIES.items()])
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in QRELS.items())]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    build_index(Corpus.open(folder), "bm25", folder / "index")
    return folder


def evaluate(*arguments: object) -> dict[str, object]:
    """Run the command; returns what it wrote."""
    main([str(argument) for argument in arguments])
    output = Path(str(arguments[list(arguments).index("--output") + 1]))
    return json.loads((output / "metrics.json").read_text())


def by_index(beir: Path) -> list[object]:
    return ["--collection", beir, "--index_path", beir / "index", "--retriever_name", "bm25"]


def test_an_index_is_measured(beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(*by_index(beir), "--output", tmp_path)
    assert report["collection"] == "tiny/test"
    assert (report["queries"], report["without_hits"], report["without_relevant"]) == (4, 1, 0)
    assert report["per_query"]["q1"] == dict.fromkeys(MEASURES, 1.0)
    assert report["per_query"]["q2"] == dict.fromkeys(MEASURES, 1.0)
    assert report["per_query"]["q3"] == dict.fromkeys(MEASURES, 0.0)
    assert report["metrics"]["recall@5"]["mean"] == 0.75
    assert report["system"]["name"] == "bm25" and report["topk"] == 100
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.json", "run.trec"]
    shown = capsys.readouterr().out
    assert re.search(r"recall@5 +0\.7500 +\d", shown) and "4 queries, 1 of them without a hit" in shown


def test_the_run_it_wrote_earns_the_same(beir: Path, tmp_path: Path) -> None:
    first = evaluate(*by_index(beir), "--output", tmp_path / "a")
    run = tmp_path / "a" / "run.trec"
    by_folder = evaluate("--collection", beir, "--run", run, "--output", tmp_path / "b")
    by_file = evaluate("--qrels", beir / "qrels" / "test.tsv", "--run", run, "--output", tmp_path / "c")
    for report in (by_folder, by_file):
        assert report["per_query"] == first["per_query"] and report["metrics"] == first["metrics"]
    assert read_run(tmp_path / "b" / "run.trec") == read_run(run)


def test_a_document_with_the_id_of_the_query_can_be_left_out(beir: Path, tmp_path: Path) -> None:
    kept = evaluate(*by_index(beir), "--topk", 1, "--output", tmp_path / "a")
    assert kept["per_query"]["d2"] == {"map": 1.0}
    evaluate(*by_index(beir), "--topk", 1, "--drop_self", "--output", tmp_path / "b")
    assert list(read_run(tmp_path / "a" / "run.trec")["d2"]) == ["d2"]
    assert list(read_run(tmp_path / "b" / "run.trec")["d2"]) == ["d0"]
    finished = ["--collection", beir, "--run", tmp_path / "a" / "run.trec", "--drop_self", "--output", tmp_path / "c"]
    assert evaluate(*finished)["per_query"]["d2"]["map"] == 0.0


@pytest.fixture(scope="module")
def dense(beir: Path, tiny_bert: Path) -> Path:
    """A dense index of the same corpus; its encoder has random weights."""
    build_index(Corpus.open(beir), "e5", beir / "dense", BuildOptions(str(tiny_bert), EncoderConfig("cpu")))
    return beir / "dense"


def test_a_dense_index_is_searched_as_the_flags_of_its_encoder_say(beir: Path, dense: Path, tmp_path: Path) -> None:
    by_dense = ["--collection", beir, "--index_path", dense, "--retriever_name", "e5", "--device", "cpu"]
    plain = evaluate(*by_dense, "--output", tmp_path / "a")
    half = evaluate(*by_dense, "--dtype", "bfloat16", "--batch_tokens", 64, "--output", tmp_path / "b")
    assert [report["system"]["details"]["precision"] for report in (plain, half)] == ["float32", "bfloat16"]
    assert plain["metrics"]["recall@100"]["mean"] == half["metrics"]["recall@100"]["mean"] == 1.0


def test_indexes_are_measured_fused(beir: Path, dense: Path, tmp_path: Path) -> None:
    flags = ["--retriever_name", "hybrid", "--device", "cpu", "--rrf_k", 10]
    report = evaluate("--collection", beir, "--index_path", beir / "index", dense, *flags, "--output", tmp_path / "out")
    details = report["system"]["details"]
    assert (report["system"]["name"], details["engines"], details["rrf_k"]) == ("hybrid", "bm25 + e5", 10)

    corpus, queries = Corpus.open(beir), list(QUERIES.values())
    parts = (open_index(beir / "index", corpus, "bm25"), open_index(dense, corpus, "e5", None))
    fused: list[dict[str, float]] = [{} for _ in queries]
    for engine in parts:
        for scores, result in zip(fused, engine.search(queries, 8), strict=True):
            for rank, document in enumerate(result.documents, start=1):
                scores[document.id] = scores.get(document.id, 0.0) + 1 / (10 + rank)
    run = read_run(tmp_path / "out" / "run.trec")
    for query, scores in zip(QUERIES, fused, strict=True):
        assert run[query] == pytest.approx(scores)
        best = sorted(scores, key=lambda document: (-round(scores[document], 12), document))
        assert list(run[query]) == best


def test_a_reranked_index_is_measured_as_far_as_the_stage_reaches(beir: Path, tmp_path: Path) -> None:
    model = write_cross_encoder(tmp_path / "cross-encoder")
    stage = ["--rerank_model", model, "--rerank_depth", 5, "--device", "cpu"]
    report = evaluate(*by_index(beir), *stage, "--output", tmp_path / "out")
    assert report["system"]["name"] == "bm25+rerank"
    assert list(report["metrics"]) == ["recall@5", "map"]  # five of eight documents: recall@10 is another measure
    reranker = CrossEncoderReranker(str(model), device="cpu")
    documents = {document.id: document for document in Corpus.open(beir).documents()}
    run = read_run(tmp_path / "out" / "run.trec")
    assert set(run) == {"q1", "q2", "d2"}  # no word of q3 occurs
    for query, scores in run.items():
        expected = reranker.score([(QUERIES[query], documents[id]) for id in scores])
        assert list(scores.values()) == pytest.approx(expected, abs=1e-5)
        assert sorted(scores.values(), reverse=True) == list(scores.values())


@pytest.fixture
def service(beir: Path) -> Iterator[str]:
    engine = open_index(beir / "index", Corpus.open(beir), "bm25")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = [
                [
                    {"document": {"id": document.id, "contents": document.contents}, "score": score}
                    for document, score in zip(result.documents, result.scores, strict=True)
                ]
                for result in engine.search(request["queries"], request["topk"])
            ]
            answer = json.dumps({"result": found}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve"
    server.shutdown()
    server.server_close()


def test_a_service_earns_what_its_index_earns(beir: Path, service: str, tmp_path: Path) -> None:
    here = evaluate(*by_index(beir), "--topk", 8, "--output", tmp_path / "a")
    there = evaluate("--collection", beir, "--url", service, "--topk", 8, "--output", tmp_path / "b")
    assert list(there["metrics"]) == ["recall@5", "map"]  # nobody knows that 8 documents are all of them
    for query, values in there["per_query"].items():
        assert values == {name: here["per_query"][query][name] for name in ("recall@5", "map")}
    runs = [read_run(tmp_path / name / "run.trec") for name in ("a", "b")]
    assert [list(scores) for scores in runs[0].values()] == [list(scores) for scores in runs[1].values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collection", "x"], "none given; expected one of --index_path, --url and --run"),
        (["--collection", "x", "--url", "http://h", "--run", "r"], "--url, --run given; expected one of"),
        (["--run", "r"], "pass either --collection, or --qrels"),
        (["--run", "r", "--collection", "x", "--qrels", "y"], "pass either --collection, or --qrels"),
        (["--url", "http://h", "--qrels", "y"], "--qrels without --queries"),
        (["--run", "r", "--collection", "nowhere"], "nowhere: no qrels/test.tsv"),
        (["--run", "r", "--qrels", "nowhere"], "nowhere cannot be read"),
        (["--run", "r", "--collection", "x", "--nprobe", "4"], "--nprobe concerns an index that is opened here"),
        (["--url", "http://h", "--collection", "x", "--rerank_model", "m"], "--rerank_model concerns an index"),
        (["--url", "http://h", "--collection", "x", "--encoder_spec", "pooling=cls"], "--encoder_spec concerns"),
    ],
)
def test_wrong_arguments_say_so(
    tmp_path: Path, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--output", str(tmp_path / "out")])
    assert caught.value.code == 1 and f"error: {message}" in capsys.readouterr().err


def test_an_index_needs_the_name_of_its_retriever(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--collection", str(beir), "--index_path", str(beir / "index"), "--output", str(beir / "out")])
    assert "--index_path needs --retriever_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["bm25", "--query_syntax", "boolean"], "query_syntax='boolean' concerns a Lucene index"),
        (["bm25", "--nprobe", "8"], "nprobe=8 concerns a dense index"),
        (["hybrid"], "retriever_name=hybrid came with 1 --index_path; expected at least two"),
        (["serper"], "retriever_name=serper has no --index_path; serve it, and pass --url"),
    ],
)
def test_flags_that_do_not_fit_the_index_say_so(
    beir: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--collection", str(beir), "--index_path", str(beir / "index"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*where, "--retriever_name", *flags])
    assert caught.value.code == 1 and f"error: {message}" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_says_so(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(word) for word in (*by_index(beir), "--output", beir / "corpus.jsonl" / "below")])
    assert "free some space or pass another --output" in capsys.readouterr().err


def test_judgements_of_another_corpus_are_noticed(beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "qrels").write_text("q1 0 other-1 1\n")
    queries = beir / "queries.jsonl"
    by_name = ["--index_path", beir / "index", "--retriever_name", "bm25", "--corpus_path", beir]
    evaluate("--qrels", tmp_path / "qrels", "--queries", queries, *by_name, "--output", tmp_path / "out")
    assert "do the qrels and the corpus have the same document ids?" in caplog.text


COLLECTION = Collection("c", {"a": "one", "b": "two", "c": "three"}, {})


def system(search: object, max_topk: int | None = None) -> System:
    return System("fake", search, max_topk, {})  # type: ignore[arg-type]


def test_queries_come_in_batches_and_the_depth_is_what_the_corpus_has() -> None:
    calls: list[tuple[list[str], int]] = []

    def search(queries: Sequence[str], topk: int) -> list[SearchResult]:
        calls.append((list(queries), topk))
        return [SearchResult(query, (), ()) for query in queries]

    config = EvaluationConfig(topk=100, drop_self=True, batch_queries=2)
    assert search_collection(system(search, 8), COLLECTION, config) == {"a": {}, "b": {}, "c": {}}
    assert calls == [(["one", "two"], 8), (["three"], 8)]
    search_collection(system(search, 101), COLLECTION, config)
    assert calls[-1] == (["three"], 101)
    search_collection(system(search), COLLECTION, config)
    assert calls[-1] == (["three"], 101)


def test_a_query_that_cannot_be_answered_ends_the_evaluation() -> None:
    def search(queries: Sequence[str], topk: int) -> list[SearchResult | RetrieverError]:
        empty = SearchResult("", (), ())
        return [empty, RetrieverError("no answer"), empty]

    with pytest.raises(RetrieverError, match="query 'b': no answer"):
        search_collection(system(search), COLLECTION, EvaluationConfig())


def test_measures_that_look_deeper_than_the_search_are_left_out() -> None:
    assert measures_of(system(None), EvaluationConfig(topk=100)) == tuple(MEASURES)
    assert measures_of(system(None, 8), EvaluationConfig(topk=100)) == tuple(MEASURES)
    assert measures_of(system(None, 5000), EvaluationConfig(topk=10)) == (
        "ndcg@10",
        "recall@5",
        "recall@10",
        "mrr@10",
        "map",
    )


def test_a_list_that_is_cut_before_the_corpus_ends_has_no_deeper_measures() -> None:
    fused = System("fake", None, 20, {}, whole=False)  # type: ignore[arg-type]
    assert "recall@20" in measures_of(fused, EvaluationConfig(topk=100))
    assert "recall@100" not in measures_of(fused, EvaluationConfig(topk=100))


def test_counts_below_one_are_refused() -> None:
    for values in ({"topk": 0}, {"batch_queries": 0}):
        with pytest.raises(ConfigError, match="expected at least 1"):
            EvaluationConfig(**values)


LUCENE_STOPWORDS = (
    " a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with "
)


def plain_bm25(documents: dict[str, str], queries: Sequence[str], k1: float, b: float) -> list[dict[str, float]]:
    """Score every document with the formula of Robertson and Zaragoza 2009 as Lucene has it, in plain Python."""
    stem = Stemmer.Stemmer("porter").stemWord

    def terms(text: str) -> list[str]:
        words = re.findall(r"\w+", re.sub(r"['’]s\b", "", text.lower()))
        return [stem(word) for word in words if f" {word} " not in LUCENE_STOPWORDS]

    counts = {id: Counter(terms(text)) for id, text in documents.items()}
    lengths = {id: sum(count.values()) for id, count in counts.items()}
    mean = sum(lengths.values()) / len(lengths)
    found = Counter(term for count in counts.values() for term in count)
    scored = []
    for query in queries:
        scores: dict[str, float] = {}
        for term in terms(query):
            idf = math.log(1 + (len(documents) - found[term] + 0.5) / (found[term] + 0.5))
            for id, count in counts.items():
                if term in count:
                    norm = k1 * (1 - b + b * lengths[id] / mean)
                    scores[id] = scores.get(id, 0.0) + idf * count[term] / (count[term] + norm)
        scored.append(scores)
    return scored


@pytest.mark.skipif(not SCIFACT.is_file(), reason="../shared/data/scifact is not there")
def test_bm25_on_scifact_is_the_published_one_and_the_plain_formula(tmp_path: Path) -> None:
    folder = tmp_path / "scifact"
    convert(SCIFACT, folder)
    corpus = Corpus.open(folder)
    build_index(corpus, "bm25", tmp_path / "index")
    by_name = ["--index_path", tmp_path / "index", "--retriever_name", "bm25"]
    report = evaluate("--collection", folder, *by_name, "--output", tmp_path / "out")
    assert report["queries"] == 300
    assert report["metrics"]["ndcg@10"]["mean"] == pytest.approx(0.672, abs=0.01)

    queries = dict(list(open_beir(folder).queries.items())[:12])
    documents = {document.id: f"{document.title}\n{document.text}" for document in corpus.documents()}
    expected = plain_bm25(documents, list(queries.values()), k1=0.9, b=0.4)
    run = read_run(tmp_path / "out" / "run.trec")
    for query, scores in zip(queries, expected, strict=True):
        best = sorted(scores.values(), reverse=True)[:100]
        assert list(run[query].values()) == pytest.approx(best, rel=1e-4)
        for document, score in run[query].items():
            assert score == pytest.approx(scores[document], rel=1e-4)
