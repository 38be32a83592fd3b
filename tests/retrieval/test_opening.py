from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.retrieval.support import PASSAGES, open_corpus, write_corpus
from tests.retrieval.test_rerank import write_cross_encoder
from tests.retrieval.web_server import WebServer
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.app import create_app
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import as_live
from verl.retrieval.opening import EngineOptions, _retriever_of, open_engine
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.server_flags import configs, parser
from verl.retrieval.wire import RequestLimits
from verl.types import SearchResult


@pytest.fixture
def indexes(tmp_path: Path, tiny_bert: Path) -> Path:
    """A folder with a corpus, its BM25 index and a dense one."""
    corpus = open_corpus(tmp_path)
    build_index(corpus, "bm25", tmp_path / "bm25")
    build_index(corpus, "e5", tmp_path / "e5", BuildOptions(str(tiny_bert), EncoderConfig("cpu")))
    return tmp_path


def options(folder: Path, name: str, *indexes: str, **more: Any) -> EngineOptions:
    paths = tuple(folder / index for index in indexes)
    device = "cpu" if "e5" in indexes or "rerank_model" in more else None
    return EngineOptions(name, paths, folder / "corpus.jsonl", device=device, **more)


def ids(result: SearchResult | RetrieverError) -> list[str]:
    assert isinstance(result, SearchResult)
    return [document.id for document in result.documents]


@pytest.mark.parametrize("name", ["bm25", "e5"])
def test_one_index_is_opened_as_it_is(indexes: Path, name: str) -> None:
    opened = open_engine(options(indexes, name, name))
    assert opened.engine.info.name == name and opened.engine.info.documents == 8
    assert opened.cacheable and opened.reranker is None
    (result,) = opened.engine.search(["river"], 3)
    assert name == "e5" or ids(result) == ["d2", "d0"]


def test_hybrid_fuses_indexes_whose_names_they_know_themselves(indexes: Path) -> None:
    opened = open_engine(options(indexes, "hybrid", "bm25", "e5", rrf_k=10, fusion_depth=5))
    details = opened.engine.info.details
    assert (details["engines"], details["rrf_k"], details["fusion_depth"]) == ("bm25 + e5", 10, 5)
    assert opened.engine.info.max_topk == 5
    assert ids(opened.engine.search(["river"], 5)[0])
    opened.engine.close()


def test_an_encoder_is_given_to_the_one_index_that_has_one(indexes: Path, tiny_bert: Path) -> None:
    opened = open_engine(options(indexes, "hybrid", "bm25", "e5", retriever_model=str(tiny_bert)))
    opened.engine.close()
    with pytest.raises(ConfigError, match="came with 2 indexes that have an encoder; expected one"):
        open_engine(options(indexes, "hybrid", "e5", "e5", retriever_model=str(tiny_bert)))


def test_a_rerank_stage_comes_with_its_reranker(indexes: Path, tmp_path: Path) -> None:
    model = write_cross_encoder(tmp_path / "cross-encoder")
    plain = open_engine(options(indexes, "bm25", "bm25")).engine
    opened = open_engine(options(indexes, "bm25", "bm25", rerank_model=str(model), rerank_depth=4))
    assert opened.reranker is not None and opened.engine.info.name == "bm25+rerank"
    assert opened.engine.info.max_topk == 4 and opened.engine.info.fingerprint != plain.info.fingerprint
    (before,), (after,) = plain.search(["river"], 4), opened.engine.search(["river"], 4)
    assert sorted(ids(before)) == sorted(ids(after))


async def test_the_service_answers_rerank_once_it_has_a_reranker(indexes: Path, tmp_path: Path) -> None:
    model = write_cross_encoder(tmp_path / "cross-encoder")
    opened = open_engine(options(indexes, "bm25", "bm25", rerank_model=str(model)))
    app = create_app(opened.engine, ServerConfig())
    body = {"queries": ["river"], "documents": [[{"id": "1", "contents": "a"}, {"id": "2", "contents": "b"}]]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retriever") as http:
        assert (await http.post("/rerank", json=body)).status_code == 404
        assert opened.reranker is not None
        app.serve_reranker(opened.reranker)
        answer = await http.post("/rerank", json={**body, "return_scores": True})
        assert answer.status_code == 200 and len(answer.json()["result"][0]) == 2
        assert "/rerank" in (await http.get("/openapi.json")).json()["paths"]
    await app.aclose()


def test_bad_lines_are_skipped_when_told_to(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl")
    path.write_text(path.read_text() + "no json\n")
    with pytest.raises(DataError, match="line 9"):
        open_engine(options(tmp_path, "bm25", "bm25"))
    build_index(Corpus.open(path, on_error="skip"), "bm25", tmp_path / "bm25")
    opened = open_engine(options(tmp_path, "bm25", "bm25", on_error="skip"))
    assert opened.engine.info.documents == len(PASSAGES)


@pytest.mark.parametrize(("mode", "cacheable"), [("off", False), ("record", False), ("replay", True)])
def test_only_what_is_replayed_may_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, cacheable: bool
) -> None:
    cache = tmp_path / "answers.sqlite"
    with WebServer() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        web = {"web_base_url": server.url, "web_pages": 2}
        recorder = open_engine(EngineOptions("serper", web_cache=cache, web_cache_mode="record", **web)).engine
        assert recorder.info.max_topk == 20
        found = recorder.search(["whale"], 3)
        assert len(ids(found[0])) == 3
        recorder.close()
        file = cache if mode != "off" else None
        opened = open_engine(EngineOptions("serper", web_cache=file, web_cache_mode=mode, **web))
        assert opened.cacheable == cacheable
        assert opened.engine.search(["whale"], 3) == found
        opened.engine.close()


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    with WebServer() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        yield server


def test_an_index_is_fused_with_the_web(indexes: Path, services: WebServer) -> None:
    web = {"fuse_with": ("serper",), "web_base_url": services.url, "fusion_weights": (1.0, 0.5)}
    opened = open_engine(options(indexes, "hybrid", "bm25", **web))
    assert not opened.cacheable and as_live(opened.engine) is not None
    details = opened.engine.info.details
    assert (details["engines"], details["weights"], details["require_all"]) == ("bm25 + serper", "1 0.5", True)
    (result,) = opened.engine.search(["river"], 3)
    assert ids(result)[:2] == ["d2", "d0"] and ids(result)[2].startswith("https://example.org/river/0")
    opened.engine.close()


def test_two_services_are_fused_without_a_corpus(services: WebServer) -> None:
    opened = open_engine(EngineOptions("hybrid", fuse_with=("serper", "google_cse"), require_all=False))
    info = opened.engine.info
    assert (info.details["engines"], info.documents, info.max_topk) == ("serper + google_cse", None, 10)
    assert info.details["require_all"] is False and not opened.cacheable
    opened.engine.close()


def test_what_a_hybrid_replays_may_be_kept_if_it_needs_all_its_parts(
    indexes: Path, tmp_path: Path, services: WebServer
) -> None:
    web = {"fuse_with": ("serper",), "web_base_url": services.url, "web_cache": tmp_path / "answers.sqlite"}
    recorder = open_engine(options(indexes, "hybrid", "bm25", **web))
    found = recorder.engine.search(["river"], 5)
    recorder.engine.close()
    assert not recorder.cacheable
    for require_all in (True, False):
        replaying = {**web, "web_cache_mode": "replay", "require_all": require_all}
        opened = open_engine(options(indexes, "hybrid", "bm25", **replaying))
        assert opened.cacheable == require_all and opened.engine.search(["river"], 5) == found
        opened.engine.close()


def test_a_bare_published_index_in_a_hybrid_has_to_be_imported_first(indexes: Path) -> None:
    (indexes / "e5" / "index.json").unlink()
    for path in ("e5", "e5/e5_Flat.index"):
        with pytest.raises(DataError, match=r"has no index\.json .* run `python -m verl\.retrieval\.build import`"):
            open_engine(options(indexes, "hybrid", "bm25", path))


PATH = Path("x")
HYBRID = {"retriever_name": "hybrid", "corpus_path": PATH, "index_path": (PATH, PATH)}
BM25 = {"retriever_name": "bm25", "corpus_path": PATH, "index_path": (PATH,)}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"retriever_name": "bm52"}, "retriever_name='bm52' is unknown; expected one of bm25"),
        ({"retriever_name": "bm25", "index_path": (PATH,)}, "needs --corpus_path"),
        ({"retriever_name": "bm25", "corpus_path": PATH}, "came with 0 --index_path; expected one"),
        ({"retriever_name": "e5", "corpus_path": PATH, "index_path": (PATH, PATH)}, "came with 2 --index_path"),
        ({**HYBRID, "index_path": (PATH,)}, "came with 1 --index_path; expected at least two, --fuse_with"),
        (
            {"retriever_name": "hybrid", "fuse_with": ("serper",)},
            "came with 0 --index_path and 1 --fuse_with; expected",
        ),
        ({**HYBRID, "fuse_with": ("bing",)}, "fuse_with=bing; expected some of serper, serpapi, google_cse, colbert"),
        ({**HYBRID, "fuse_with": ("serper", "serper")}, "fuse_with=serper serper; .*, each once"),
        (
            {**HYBRID, "fusion_weights": (1.0,)},
            "1 --fusion_weights came for 2 --index_path and 0 --fuse_with; expected",
        ),
        ({**HYBRID, "fuse_with": ("serper",), "corpus_path": None}, "hybrid needs --corpus_path"),
        ({"retriever_name": "hybrid"}, "needs --corpus_path"),
        (
            {**HYBRID, "index_path": (), "fuse_with": ("serper", "serpapi")},
            "came with --corpus_path but no --index_path",
        ),
        (
            {**HYBRID, "fuse_with": ("serper", "serpapi"), "web_base_url": "u"},
            "2 --fuse_with came; leave --web_base_url",
        ),
        ({**BM25, "fuse_with": ("serper",)}, "concerns a hybrid, and none is opened"),
        ({**BM25, "fusion_weights": (1.0,)}, "leave --fusion_weights out"),
        ({**BM25, "require_all": False}, "require_all=False concerns a hybrid"),
        ({"retriever_name": "serper", "rrf_k": 10}, "rrf_k=10 concerns a hybrid"),
        ({"retriever_name": "serper", "corpus_path": PATH}, "searches the web; leave --index_path and --corpus_path"),
        ({"retriever_name": "serper", "threads": 0}, "threads=0"),
        ({"retriever_name": "serper", "on_error": "ignore"}, "on_error='ignore'; expected one of raise, skip"),
        ({"retriever_name": "serper", "web_cache_mode": "x"}, "web_cache_mode='x'; expected one of"),
        ({**BM25, "query_syntax": "boolean"}, "query_syntax='boolean' concerns a Lucene index, and none is opened"),
        ({**BM25, "lucene_k1": 1.0}, "leave --lucene_k1 out"),
        ({**BM25, "nprobe": 64}, "nprobe=64 concerns a dense index"),
        ({**BM25, "faiss_gpu": True}, "faiss_gpu=True concerns a dense index"),
        ({**BM25, "device": "cpu"}, "device='cpu' concerns a dense index"),
        ({**BM25, "retriever_name": "e5", "on_syntax_error": "error"}, "concerns a Lucene index"),
        ({"retriever_name": "serper", "retriever_model": "x"}, "concerns a dense index"),
        ({**BM25, "web_cache": PATH}, "concerns a web service"),
        ({"retriever_name": "serper", "web_cache_mode": ""}, "web_cache_mode=''; expected one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EngineOptions(**wrong)


def test_options_must_concern_an_index_of_a_hybrid(indexes: Path) -> None:
    with pytest.raises(ConfigError, match=r"query_syntax='boolean' concerns a Lucene index.*\(bm25, e5\)"):
        open_engine(options(indexes, "hybrid", "bm25", "e5", query_syntax="boolean"))


def test_a_published_lucene_index_is_known_by_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json"):
        _retriever_of(tmp_path)
    (tmp_path / "segments_2").touch()
    assert _retriever_of(tmp_path) == "lucene"


def test_a_device_may_be_the_rerankers() -> None:
    assert EngineOptions(**BM25, device="cpu", rerank_model="r").device == "cpu"


@pytest.mark.parametrize(
    ("file", "mode", "replay"),
    [(None, None, "off"), (PATH, None, "record"), (PATH, "off", "off"), (PATH, "replay", "replay")],
)
def test_a_named_file_of_answers_is_kept(file: Path | None, mode: Any, replay: str) -> None:
    assert EngineOptions("serper", web_cache=file, web_cache_mode=mode).replay_mode == replay


def test_the_published_flags_are_enough() -> None:
    flags = "--index_path i --corpus_path c --retriever_name e5 --topk 8 --host ::1 --port 3001 --retriever_model m"
    server, engine = configs(parser().parse_args([*flags.split(), "--faiss_gpu"]))
    assert server == ServerConfig(topk=8, host="::1", port=3001)
    assert engine == EngineOptions("e5", (Path("i"),), Path("c"), retriever_model="m", faiss_gpu=True)


def test_every_flag_reaches_its_field() -> None:
    flags = (
        "--retriever_name hybrid --index_path a b --corpus_path c --corpus_cache d --on-error skip --threads 2 "
        "--encoder_spec f.yaml --encoder_spec pooling=cls --device cpu --dtype bfloat16 --batch_tokens 64 --nprobe "
        "4 --ef_search 5 --query_syntax boolean --on_syntax_error bag_of_words --lucene_k1 1.5 --lucene_b 0.5 "
        "--fuse_with serper serpapi --fusion_weights 1 2 0.5 0.25 --no-require_all "
        "--rrf_k 6 --fusion_depth 7 --rerank_model r --rerank_depth 8 --web_cache w --web_cache_mode replay "
        "--web_rate 0.5 --web_pages 2 "
        "--workers 3 --batch_queries 9 --batch_window_ms 1.5 --drain_s 2 --shutdown_timeout_s 3 --token_env T "
        "--cache_file s --cache_mb 1 --cache_disk_mb 2 --max_queued_queries 2000 --max_connections 4 --max_body_mb 5 "
        "--header_timeout_s 6 --body_timeout_s 7 --write_timeout_s 8 --keep_alive_s 9 "
        "--max_body_bytes 10 --max_queries 11 --max_query_chars 12 --max_topk 13 --max_documents 14"
    )
    server, engine = configs(parser().parse_args(flags.split()))
    assert server == ServerConfig(
        workers=3,
        limits=RequestLimits(10, 11, 12, 13, 14),
        batch_queries=9,
        batch_window_ms=1.5,
        drain_s=2.0,
        shutdown_timeout_s=3.0,
        token_env="T",
        cache=CacheConfig(1.0, Path("s"), 2.0),
        max_queued_queries=2000,
        max_connections=4,
        max_body_mb=5,
        header_timeout_s=6.0,
        body_timeout_s=7.0,
        write_timeout_s=8.0,
        keep_alive_s=9.0,
    )
    assert engine == EngineOptions(
        "hybrid",
        (Path("a"), Path("b")),
        Path("c"),
        Path("d"),
        "skip",
        threads=2,
        encoder_spec=("f.yaml", "pooling=cls"),
        device="cpu",
        dtype="bfloat16",
        batch_tokens=64,
        nprobe=4,
        ef_search=5,
        query_syntax="boolean",
        on_syntax_error="bag_of_words",
        lucene_k1=1.5,
        lucene_b=0.5,
        fuse_with=("serper", "serpapi"),
        fusion_weights=(1.0, 2.0, 0.5, 0.25),
        require_all=False,
        rrf_k=6,
        fusion_depth=7,
        rerank_model="r",
        rerank_depth=8,
        web_cache=Path("w"),
        web_cache_mode="replay",
        web_rate=0.5,
        web_pages=2,
    )
    flags = "--retriever_name serper --web_base_url u"
    assert configs(parser().parse_args(flags.split()))[1] == EngineOptions("serper", web_base_url="u")


def test_what_is_opened_is_what_was_built(indexes: Path) -> None:
    info = json.loads((indexes / "bm25" / "index.json").read_text())
    other = write_corpus(indexes / "other.jsonl", PASSAGES[:3])
    assert info["documents"] == 8
    with pytest.raises(DataError, match="was built for another corpus"):
        open_engine(EngineOptions("bm25", (indexes / "bm25",), other))


def test_an_index_of_a_hybrid_that_is_not_there_is_named(tmp_path: Path) -> None:
    indexes = (tmp_path / "none", tmp_path / "neither")
    with pytest.raises(DataError, match=f"index {indexes[0]}: no such file or folder; build it"):
        open_engine(EngineOptions("hybrid", indexes, open_corpus(tmp_path).path))
