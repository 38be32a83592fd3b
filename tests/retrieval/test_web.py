from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.web_server import Fault, WebServer
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.replay import ReplayMode
from verl.retrieval.web import WebConfig, WebEngine, open_engine
from verl.retrieval.web_formats import APIS
from verl.retrieval.web_http import FetchConfig, Fetcher, Secrets, check_base_url
from verl.types import Document, SearchResult

PROVIDERS = tuple(APIS)
FAST = FetchConfig(rate=1000, timeout_s=5, attempts=3, backoff_s=0.001, max_wait_s=0.5, max_body_bytes=100_000)

Opener = Callable[..., WebEngine]


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def web(server: WebServer) -> Iterator[Opener]:
    engines: list[WebEngine] = []

    def open_(provider: str = "serper", http: FetchConfig = FAST, **config: Any) -> WebEngine:
        engines.append(open_engine(WebConfig(provider, server.url, http=http, **config), server.environ))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def found(engine: WebEngine, query: str = "whale", topk: int = 10) -> SearchResult:
    (result,) = engine.search([query], topk)
    assert isinstance(result, SearchResult), result
    return result


def failure(engine: WebEngine, query: str = "whale") -> str:
    (result,) = engine.search([query], 3)
    assert isinstance(result, RetrieverError)
    return str(result)


def whale(number: int) -> Document:
    return Document(f"https://example.org/whale/{number}", f"whale {number}", f"About whale, number {number}.")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_results_come_as_documents_in_the_services_order(web: Opener, provider: str) -> None:
    result = found(web(provider), topk=4)
    expected = [whale(0), whale(1), whale(2), whale(3)]
    if provider != "google_cse":
        box = result.documents[0]
        assert (box.title, box.text) == ("Whale", "A mammal.")
        # The box quotes the first result's page, so it must not take that page's id.
        assert box.id.startswith("https://example.org/whale/0#web-")
        expected = [box, *expected[:3]]
    assert list(result.documents) == expected
    assert result.query == "whale" and result.scores == (1.0, 1 / 2, 1 / 3, 1 / 4)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_further_pages_are_asked_for_only_when_they_are_needed(web: Opener, server: WebServer, provider: str) -> None:
    engine = web(provider, pages=4)
    assert engine.info.max_topk == 40
    longest = found(engine, topk=40)
    assert len(server.asked) == (3 if provider == "google_cse" else 4)  # only Google says which page is the last
    for topk in (1, 10, 11, 14, 25):
        assert found(engine, topk=topk).documents == longest.documents[:topk]
        assert found(engine, topk=topk).scores == longest.scores[:topk]
    server.asked.clear()
    found(engine, topk=10)
    assert len(server.asked) == 1
    pages = [whale(number) for number in range(25)]
    assert [document for document in longest.documents if "#" not in document.id and "web-" not in document.id] == pages
    others = [document.title for document in longest.documents if document not in pages]
    assert others == ([] if provider == "google_cse" else ["Whale", "Is a whale a fish?", "Is a whale big?"])
    assert len({document.id for document in longest.documents}) == len(longest.documents)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_search_that_finds_nothing_is_an_empty_result(web: Opener, provider: str) -> None:
    assert found(web(provider, pages=2), "nothing").documents == ()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_language_and_country_are_sent_and_known_to_the_fingerprint(
    web: Opener, server: WebServer, provider: str
) -> None:
    engine = web(provider, language="de", country="at")
    found(engine)
    sent = server.asked[0].body or server.asked[0].query
    assert (sent["hl"], sent["gl"]) == ("de", "at")
    assert engine.info.fingerprint != web(provider).info.fingerprint
    assert engine.info.name == provider and engine.info.documents is None and engine.info.corpus == ""


def test_a_query_twice_in_a_call_is_asked_once_and_order_is_kept(web: Opener, server: WebServer) -> None:
    results = web().search(["b", "a", "b"], 3)
    assert [result.query for result in results if isinstance(result, SearchResult)] == ["b", "a", "b"]
    assert sorted(asked.body["q"] for asked in server.asked) == ["a", "b"]
    assert results[0] == results[2]


def test_topk_beyond_the_pages_is_refused(web: Opener) -> None:
    with pytest.raises(RetrieverError, match="topk=11 exceeds serper's most, 10 documents"):
        web().search(["q"], 11)


# --- faults ---

FAULTS = [
    (Fault(200, b"<!DOCTYPE html><title>Sorry</title>"), "not JSON (JSONDecodeError); it starts with: <!DOCTYPE html>"),
    (Fault(200, b""), "not JSON (JSONDecodeError); it starts with: nothing"),
    (Fault(200, b'{"organic": ['), "not JSON"),
    (Fault(200, b"[" * 50_000), "not JSON (RecursionError)"),
    (Fault(200, b"[1, 2]"), "the answer is a JSON list; expected an object"),
    (Fault(200, b"{}"), "the answer has neither organic nor searchParameters"),
    (Fault(200, b'{"organic": {"title": "x"}}'), "organic is no list of objects"),
    (Fault(200, b'{"organic": ["x"]}'), "organic is no list of objects"),
    (Fault(200, b'{"organic": [{"title": "\xff"}]}'), "the answer is not UTF-8 at byte 24"),
    (Fault(200, b" " * 100_001), "the answer has more than 100000 bytes"),
    (Fault(200, gzip.compress(b" " * 3_000_000), {"Content-Encoding": "gzip"}), "more than 100000 bytes"),
    (Fault(200, b'{"message": "Not enough credits", "statusCode": 400}'), "error: Not enough credits"),
    (Fault(400, b'{"message": "Not enough credits"}'), "status 400: Not enough credits"),
    (Fault(400, b'{"message": "' + b"long " * 999 + b'"}'), "status 400: " + "long " * 39 + "lo..."),
    (Fault(401, b'{"error": "Invalid API key"}'), "status 401: Invalid API key; check SERPER_API_KEY"),
    (Fault(403, b"<html>\n forbidden </html>"), "status 403: <html> forbidden </html>; check SERPER_API_KEY"),
    (Fault(302, b"", {"Location": "http://example.org/steal"}), "status 302: no reason given"),
    (Fault(404, b"\xff\xfe"), "status 404: no reason given"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_a_fault_that_asking_again_cannot_mend_is_an_error_after_one_request(
    web: Opener, server: WebServer, fault: Fault, reason: str
) -> None:
    engine = web()
    server.always = fault
    message = failure(engine)
    assert message.startswith("serper: ") and reason in message and "\n" not in message
    assert len(server.asked) == 1
    server.always = None
    assert found(engine).documents


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(500, b"oops"), "status 500: oops"),
        (Fault(503, b""), "status 503: no reason given"),
        (Fault(429, b'{"message": "Too many requests"}'), "status 429: Too many requests"),
        (Fault(408, b"slow"), "status 408: slow"),
        (Fault(drop=True), "RemoteProtocolError"),
        (Fault(200, b"not gzip", {"Content-Encoding": "gzip"}), "DecodingError"),
        (Fault(200, b"short", {"Content-Length": "100", "Connection": "close"}), "RemoteProtocolError"),
        (Fault(200, b"x" * 100, drip_s=0.05), "no answer within 0.2 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_passing_fault_is_tried_again_within_bounds(
    web: Opener, server: WebServer, fault: Fault, reason: str
) -> None:
    http = FetchConfig(rate=1000, timeout_s=0.2, attempts=3, backoff_s=0.001)
    engine = web(http=http)
    server.faults.extend([fault, fault])
    assert found(engine).documents
    assert len(server.asked) == 3
    server.always = fault
    assert reason in failure(engine) and "(3 attempts)" in failure(engine)
    assert len(server.asked) == 3 + 6


def test_an_answer_that_does_not_come_is_given_up(web: Opener, server: WebServer) -> None:
    engine = web(http=FetchConfig(rate=1000, timeout_s=0.1, attempts=2, backoff_s=0.001))
    server.always = Fault(delay_s=0.5)
    assert failure(engine) == "serper: no answer within 0.1 s (2 attempts)"


def test_an_error_concerns_its_own_query_alone(web: Opener, server: WebServer) -> None:
    engine = web(http=FetchConfig(rate=1000, concurrency=1, attempts=1))
    server.faults.append(Fault(400, b'{"message": "bad query"}'))
    first, second, third = engine.search(["a", "b", "c"], 2)
    assert isinstance(first, RetrieverError) and "bad query" in str(first)
    assert isinstance(second, SearchResult) and isinstance(third, SearchResult)


def test_retry_after_keeps_every_request_back(web: Opener, server: WebServer) -> None:
    engine = web(http=FetchConfig(rate=1000, concurrency=1, attempts=2, backoff_s=0.001, max_wait_s=5))
    server.faults.append(Fault(429, b"slow down", {"Retry-After": "1"}))
    start = time.monotonic()
    assert all(isinstance(result, SearchResult) for result in engine.search(["a", "b"], 2))
    assert all(asked.moment - start >= 0.99 for asked in server.asked[1:])


def test_a_service_that_wants_to_be_left_alone_for_long_is(web: Opener, server: WebServer) -> None:
    engine = web()
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server.faults.append(Fault(429, b'{"message": "quota"}', {"Retry-After": later}))
    assert failure(engine) == "serper: status 429: quota (1 attempts)"
    assert "asked to be left alone for 3" in failure(engine)
    assert len(server.asked) == 1


def test_serpapi_errors_with_status_200(web: Opener, server: WebServer) -> None:
    engine = web("serpapi")
    quota = {"error": "Your account has run out of searches."}
    server.faults.append(Fault(200, json.dumps(quota).encode()))
    assert failure(engine) == "serpapi: error: Your account has run out of searches."
    broken = {"search_metadata": {"status": "Error"}, "error": "Proxy timeout"}
    server.faults.append(Fault(200, json.dumps(broken).encode()))
    assert failure(engine) == "serpapi: error: Proxy timeout"
    server.faults.append(Fault(200, b'{"search_metadata": {"status": "Processing"}}'))
    assert failure(engine) == "serpapi: the search is 'Processing'; expected 'Success'"
    server.faults.append(Fault(200, b'{"results": []}'))
    assert failure(engine) == "serpapi: the answer has neither organic_results nor search_metadata"


def google_error(code: int, reason: str) -> bytes:
    errors = [{"reason": reason, "domain": "usageLimits"}]
    return json.dumps({"error": {"code": code, "message": f"Quota: {reason}", "errors": errors}}).encode()


def test_google_says_429_with_403(web: Opener, server: WebServer) -> None:
    engine = web("google_cse")
    server.faults.append(Fault(403, google_error(403, "userRateLimitExceeded")))
    assert found(engine).documents and len(server.asked) == 2
    server.faults.append(Fault(403, google_error(403, "dailyLimitExceeded")))
    message = failure(engine)
    assert message.endswith("status 403: Quota: dailyLimitExceeded; check GOOGLE_API_KEY and GOOGLE_CSE_ID")
    server.faults.append(Fault(200, google_error(429, "x")))
    assert failure(engine) == "google_cse: error: Quota: x"
    server.faults.append(Fault(200, b'{"kind": "other"}'))
    assert failure(engine) == "google_cse: the answer is no customsearch#search"


def test_no_second_sees_more_than_the_rate(web: Opener, server: WebServer) -> None:
    engine = web(http=FetchConfig(rate=6, attempts=3, backoff_s=0.001))
    server.faults.extend([Fault(500)] * 3)
    engine.search([str(number) for number in range(12)], 2)
    moments = [asked.moment for asked in server.asked]
    assert len(moments) == 15
    # Arrivals are a second apart like departures, but for the time on the way and in a busy server.
    assert all(later - earlier > 0.6 for earlier, later in zip(moments, moments[6:], strict=False))


# --- keys ---


@pytest.mark.parametrize("provider", PROVIDERS)
def test_keys_show_in_no_log_message_cache_or_description(
    web: Opener, server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, provider: str
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="httpx")  # an entry point quietens it, in whichever test ran before
    cache = tmp_path / "answers.sqlite"
    engine = web(provider, cache=cache, cache_mode="record")
    echo = f"you sent {server.key}"
    if provider == "google_cse":
        echo += f" and {server.cse_id} ({server.cse_id.replace(':', '%3A')})"
    server.extra = {"note": echo}
    shown = [str(found(engine)), str(engine.info), repr(engine), repr(vars(engine))]
    server.extra = {}
    for number, fault in enumerate(
        [Fault(400, echo.encode()), Fault(500, echo.encode()), Fault(200, echo.encode()), Fault(drop=True)]
    ):
        server.always = fault
        shown.append(failure(engine, f"query {number}"))
    engine.close()
    shown += [caplog.text, cache.read_bytes().decode("latin-1")]
    asked = [record for record in caplog.records if record.name == "httpx"]
    assert asked and all(server.url in record.getMessage() for record in asked)
    sent = server.asked[0]
    assert server.key in (*sent.query.values(), sent.headers.get("X-API-KEY"))
    for text in shown:
        assert server.key not in text and "0123456789" not in text
    assert any("you sent [key]" in text for text in shown)


@pytest.mark.parametrize(
    ("provider", "variable"), [("serpapi", "SERPAPI_API_KEY"), ("serper", "SERPER_API_KEY"), ("google_cse", "GOOGLE_")]
)
def test_a_missing_key_is_named(provider: str, variable: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment variable {variable}.* is not set"):
        open_engine(WebConfig(provider), {})


@pytest.mark.parametrize("value", ["short", "with space inside", "new\nline-in-it", "ключ-ключ-ключ"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ConfigError, match="SERPER_API_KEY holds no key") as caught:
        open_engine(WebConfig("serper"), {"SERPER_API_KEY": value})
    assert value not in str(caught.value)


def test_a_wrong_key_is_an_error_that_names_the_variable(server: WebServer) -> None:
    environ = {**server.environ, "SERPAPI_API_KEY": "another-key"}
    engine = open_engine(WebConfig("serpapi", server.url, http=FAST), environ)
    assert failure(engine) == "serpapi: status 401: Invalid API key.; check SERPAPI_API_KEY"
    engine.close()


def test_keys_are_not_followed_to_another_place() -> None:
    for url in ("http://example.org", "ftp://localhost", "https://", "localhost", "https://a:99999999", "http://[x"):
        with pytest.raises(ConfigError, match="base_url"):
            check_base_url(url)
    with pytest.raises(ConfigError, match="no plain address") as caught:
        check_base_url("https://user:sesame@example.org/?q=1")
    assert "sesame" not in str(caught.value)
    for url in ("https://example.org", "https://example.org/proxy/", "http://localhost:1", "http://[::1]:80"):
        check_base_url(url)


async def test_a_proxy_that_cannot_be_used_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "gopher://user:sesame@proxy:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigError, match="proxy for the web cannot be used") as caught:
        Fetcher("https://example.org", Secrets([], {}), FAST)
    assert "sesame" not in str(caught.value)


# --- cache ---


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_recorded_run_is_replayed_offline_bit_for_bit(
    web: Opener, server: WebServer, tmp_path: Path, provider: str
) -> None:
    cache = tmp_path / "answers.sqlite"
    queries = ["whale", "nothing", "shark"]
    recorder = web(provider, pages=2, cache=cache, cache_mode="record")
    recorded = recorder.search(queries, 15)
    count = len(server.asked)
    assert recorder.search(queries, 15) == recorded and len(server.asked) == count
    config = WebConfig(provider, pages=2, cache=cache, cache_mode="replay")
    replayer = open_engine(config, {"GOOGLE_CSE_ID": server.cse_id})
    assert replayer.search(queries, 15) == recorded
    missing, known = replayer.search(["never asked", "whale"], 1)
    assert isinstance(missing, RetrieverError) and "has no answer of" in str(missing)
    assert isinstance(known, SearchResult) and known.documents == recorded[0].documents[:1]  # type: ignore[union-attr]
    replayer.close()
    assert len(server.asked) == count


@pytest.mark.parametrize(("mode", "requests"), [("record", 1), ("refresh", 2), ("off", 3)])
def test_how_often_each_mode_asks(
    web: Opener, server: WebServer, tmp_path: Path, mode: ReplayMode, requests: int
) -> None:
    cache = tmp_path / "answers.sqlite"
    found(web(cache=cache, cache_mode="record"))
    time.sleep(0.002)
    engine = web(cache=cache, cache_mode=mode)
    found(engine)
    found(engine)
    assert len(server.asked) == requests


def test_an_answer_that_is_no_result_is_not_recorded(web: Opener, server: WebServer, tmp_path: Path) -> None:
    engine = web(cache=tmp_path / "answers.sqlite", cache_mode="record")
    server.faults.extend([Fault(200, b"{}"), Fault(200, b"<html>"), Fault(400, b"{}")])
    for _ in range(3):
        failure(engine)
    assert found(engine).documents


def test_another_search_engine_id_is_another_cache_entry(server: WebServer, tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    recorder = open_engine(WebConfig("google_cse", server.url, cache=cache, cache_mode="record"), server.environ)
    found(recorder)
    config = WebConfig("google_cse", cache=cache, cache_mode="replay")
    other = open_engine(config, {"GOOGLE_CSE_ID": "another-engine"})
    assert "has no answer" in failure(other)
    assert other.info.fingerprint != recorder.info.fingerprint
    for engine in (recorder, other):
        engine.close()
    with pytest.raises(ConfigError, match="GOOGLE_CSE_ID is not set"):
        open_engine(config, {})


def test_a_replay_without_its_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; record it first"):
        open_engine(WebConfig("serper", cache=tmp_path / "none", cache_mode="replay"), {})


# --- formats ---


def test_texts_are_one_line_and_without_what_is_no_character() -> None:
    items = [
        {"title": " A\n\ttitle ", "snippet": "half \ud800 pair \U0001f40b", "link": "https://x/1"},
        {"title": 1984, "snippet": None, "link": None},
        {"title": "", "snippet": "", "link": "https://x/nothing"},
        {"title": "again", "snippet": "same link", "link": "https://x/1"},
        {"title": True, "snippet": ["no", "text"]},
    ]
    page = APIS["serper"].parse({"organic": items})
    first, second, third = page.documents
    assert (first.id, first.title, first.text) == ("https://x/1", "A title", "half \ufffd pair \U0001f40b")
    assert second.title == "1984" and second.text == "" and second.id.startswith("web-")
    assert third == Document("https://x/1", "again", "same link")


def test_answer_boxes_without_an_answer_are_left_out() -> None:
    parse = APIS["serpapi"].parse
    for box, expected in (
        ({"type": "calculator_result", "result": 42}, [("", "42")]),
        ({"title": "T", "answer": "A"}, [("T", "A")]),
        ({"title": "T", "link": "https://x"}, []),
        (["no object"], []),
    ):
        page = parse({"organic_results": [], "answer_box": box})
        assert [(document.title, document.text) for document in page.documents] == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
hits = st.dictionaries(st.sampled_from(["title", "snippet", "link", "question", "answer"]), json_values)
KEYS = (
    *("search_metadata", "organic_results", "answer_box", "related_questions", "error", "organic", "answerBox"),
    *("peopleAlsoAsk", "searchParameters", "message", "kind", "items", "queries"),
)


@given(
    provider=st.sampled_from(PROVIDERS),
    answer=st.dictionaries(st.sampled_from(KEYS), json_values | hits | st.lists(hits, max_size=4)),
)
def test_any_answer_becomes_documents_or_a_reason(provider: str, answer: dict[str, Any]) -> None:
    try:
        documents = APIS[provider].parse(answer).documents
    except RetrieverError:
        documents = ()
    for document in documents:
        assert document.id and (document.title or document.text)
        assert "\n" not in document.title
        f"{document.id}{document.title}{document.text}".encode()


# --- configuration ---


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"provider": "bing"}, "expected one of serpapi, serper, google_cse"),
        ({"pages": 0}, "expected 1 to 10"),
        ({"pages": 11}, "expected 1 to 10"),
        ({"language": "en&key=1"}, "expected a code"),
        ({"base_url": "http://example.org"}, "expected https"),
    ],
)
def test_a_wrong_web_config_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        WebConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"concurrency": 0}, {"timeout_s": -1}, {"attempts": 0}, {"backoff_s": float("nan")}]
)
def test_a_wrong_fetch_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FetchConfig(**wrong)


@pytest.mark.parametrize(
    ("config", "most"), [({}, 100), ({"rate": 50.0}, 1000), ({"rate": 0.01}, 1), ({"concurrency": 3}, 3)]
)
def test_by_default_the_rate_alone_keeps_queries_waiting(config: dict[str, Any], most: int) -> None:
    assert FetchConfig(**config).most_at_once == most
