"""Searches as the agent makes them, against the local server: PubMed's format and ClinicalTrials.gov's."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.engines.literature_server import (
    BACKEND_FAILED,
    ESEARCH_JSON,
    ESEARCH_XML,
    KEY,
    MAINTENANCE,
    RATE_EXCEEDED,
    STUDIES,
    LiteratureServer,
)
from verl.agent.protocols import PerQuestion, Search
from verl.config import build
from verl.errors import ConfigError, DataError, RetrieverError
from verl.retrieval.engines.demo_records import Record, records, search
from verl.retrieval.engines.demo_server import Asked, Reply
from verl.retrieval.engines.literature import LiteratureConfig, LiteratureSearch, open_literature, searched
from verl.retrieval.engines.service import ServiceConfig
from verl.retrieval.replay import ReplayCache, ReplayRequest
from verl.types import Question, SearchResult

HTTP = ServiceConfig(rate=1000, backoff_s=0.001, timeout_s=5, attempts=3)
ENVIRON = {"NCBI_API_KEY": KEY}
ENGINES = ("pubmed", "ctgov")
ENGINE = pytest.mark.parametrize("engine", ENGINES)


def opened(server: LiteratureServer, engine: str = "pubmed", **settings: object) -> LiteratureSearch:
    config = LiteratureConfig(engine=engine, base_url=server.url, http=HTTP)  # pyright: ignore[reportArgumentType]
    return open_literature(replace(config, **settings), ENVIRON)


def ids_of(engine: str, found: Sequence[Record]) -> list[str]:
    return [record.pmid if engine == "pubmed" else record.nct for record in found]


def ids(result: SearchResult) -> list[str]:
    return [document.id for document in result.documents]


def question(**extra: str) -> Question:
    return Question("pubmed/train/0", "P: adults", ("1",), "pubmed", extra=extra)


def sent(server: LiteratureServer) -> list[Asked]:
    return [asked for asked in server.asked if "esummary" not in asked.path]


@ENGINE
async def test_it_finds_what_the_service_has(server: LiteratureServer, engine: str) -> None:
    async with opened(server, engine) as literature:
        assert isinstance(literature, PerQuestion)
        protocol: Search = literature
        first, second = await protocol(["asthma AND (pain OR aspirin)", "nowhere"], 3000)
    expected = ids_of(engine, search("asthma AND (pain OR aspirin)", records()))
    assert ids(first) == expected and len(expected) == 9
    assert first.query == "asthma AND (pain OR aspirin)" and first.scores == tuple(1 / n for n in range(1, 10))
    assert {(document.title, document.text) for document in first.documents} == {("", "")}
    assert second == SearchResult("nowhere", (), ())


async def test_xml_says_the_same(server: LiteratureServer) -> None:
    async with opened(server, retmode="xml") as as_xml, opened(server) as as_json:
        asked = ["asthma OR pain", 'nowhere "&" <Id>1</Id>']
        assert await as_xml(asked, 100) == await as_json(asked, 100)
        assert ids((await as_xml(["nowhere"], 100))[0]) == []


@ENGINE
@pytest.mark.parametrize(
    ("page_size", "topk", "pages"),
    [(200, 3000, 1), (100, 3000, 2), (99, 3000, 3), (70, 140, 2), (70, 141, 3), (1000, 1, 1), (1000, 200, 1)],
)
async def test_pages_up_to_the_cap(
    server: LiteratureServer, engine: str, page_size: int, topk: int, pages: int
) -> None:
    async with opened(server, engine, page_size=page_size) as literature:
        (result,) = await literature(["trial"], topk)
    assert ids(result) == ids_of(engine, records())[:topk]
    assert len(server.asked) == pages


async def test_what_is_asked_of_pubmed(server: LiteratureServer) -> None:
    async with opened(server, email="me@example.org", page_size=20) as literature:
        await literature.bound(question(pub_date="2001/02/03"))(["asthma"], 3000)
    assert [(asked.method, asked.path, asked.parameters) for asked in server.asked] == [
        (
            "GET",
            "/entrez/eutils/esearch.fcgi",
            {
                "db": "pubmed",
                "term": "asthma",
                "retmode": "json",
                "retstart": "0",
                "retmax": "20",
                "datetype": "pdat",
                "mindate": "1970/01/01",
                "maxdate": "2001/02/03",
                "tool": "search-agents",
                "email": "me@example.org",
                "api_key": KEY,
            },
        )
    ]


async def test_what_is_asked_of_clinicaltrials(server: LiteratureServer) -> None:
    async with opened(server, "ctgov", page_size=20) as literature:
        await literature(["asthma"], 3000)
    first = {"query.term": "asthma", "pageSize": "20", "fields": "NCTId"}
    assert [asked.parameters for asked in server.asked] == [
        {**first, "countTotal": "true"},
        {**first, "pageToken": "from-20"},
    ]


async def test_a_question_limits_pubmed_to_its_date(server: LiteratureServer) -> None:
    async with opened(server) as literature:
        unlimited = await literature.bound(question())(["asthma"], 3000)
        assert unlimited == await literature(["asthma"], 3000) and len(ids(unlimited[0])) == 25
        for until in ("2001/02/03", "2001/02", "2001"):
            (found,) = await literature.bound(question(pub_date=until))(["asthma"], 3000)
            assert ids(found) == ids_of("pubmed", search("asthma", records(), until)) and len(ids(found)) < 25


async def test_no_date_limits_clinicaltrials(server: LiteratureServer) -> None:
    async with opened(server, "ctgov") as literature:
        dated = literature.bound(question(pub_date="1990/01/01"))
        assert len(ids((await dated(["asthma"], 3000))[0])) == 25


@pytest.mark.parametrize("until", ["tomorrow", "2001-02-03", "2001/13/01", "01/02/2003", "2001/02/03&x=1", "2001/2/3"])
async def test_a_date_that_is_none_fails_as_data(server: LiteratureServer, until: str) -> None:
    async with opened(server) as literature:
        dated = literature.bound(question(pub_date=until))
        with pytest.raises(RetrieverError, match="expected YYYY/MM/DD"):
            await dated(["asthma"], 10)
    assert server.asked == []


@ENGINE
@pytest.mark.parametrize(
    ("query", "term"),
    [
        ("a & b", "a & b"),
        ("a&maxdate=3000/01/01#x", "a&maxdate=3000/01/01#x"),
        ("\"heart failure\" #1 'x' %20 +", "\"heart failure\" #1 'x' %20 +"),
        ("a\x00b\nc\td\x7f\x85e\r\n", "a b c d  e"),
        ("哮喘 OR صرع OR \U0001f600", "哮喘 OR صرع OR \U0001f600"),
        ("half \ud83d of a pair \ud83d\ude00", "half \ufffd of a pair \U0001f600"),
    ],
)
async def test_every_character_arrives(server: LiteratureServer, engine: str, query: str, term: str) -> None:
    async with opened(server, engine) as literature:
        (result,) = await literature.bound(question(pub_date="2001/02/03"))([query], 10)
    asked = sent(server)[0].parameters
    assert asked["term" if engine == "pubmed" else "query.term"] == term and result.query == query
    assert asked.get("maxdate") == ("2001/02/03" if engine == "pubmed" else None)


@ENGINE
@pytest.mark.parametrize("query", ["", "  ", "\x00\x01\n\x7f"])
async def test_a_blank_query_finds_nothing_and_asks_nobody(server: LiteratureServer, engine: str, query: str) -> None:
    async with opened(server, engine) as literature:
        assert await literature([query], 10) == [SearchResult(query, (), ())]
    assert server.asked == []


async def test_a_long_query_travels_as_a_form(server: LiteratureServer) -> None:
    query = "asthma OR pain OR " * 6_000 + "stroke & #"
    async with opened(server) as literature:
        (result,) = await literature([query], 3000)
    (asked,) = server.asked
    assert len(query) > 100_000 and asked.method == "POST"
    assert asked.parameters["term"] == query and asked.parameters["api_key"] == KEY
    assert ids(result) == ids_of("pubmed", search("asthma OR pain OR stroke", records()))


async def test_a_query_too_long_for_clinicaltrials_is_refused(server: LiteratureServer) -> None:
    async with opened(server, "ctgov") as literature:
        with pytest.raises(RetrieverError, match=r"ctgov: the query of 100000 characters .* so shorten it"):
            await literature(["a" * 100_000], 10)
        (found,) = await literature(["asthma OR " * 1_000 + "pain"], 3000)
    assert ids(found) and len(server.asked) == 1


async def test_a_query_that_cannot_be_parsed_finds_nothing(
    server: LiteratureServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "verl")
    async with opened(server, "ctgov") as literature:
        assert await literature(["asthma[MeSH Terms]", "(asthma"], 10) == [
            SearchResult("asthma[MeSH Terms]", (), ()),
            SearchResult("(asthma", (), ()),
        ]
        assert literature.refused == 2
    assert "ctgov cannot parse a query, which finds nothing: Error parsing query in Other terms" in caplog.text


async def test_a_refusal_of_the_rest_of_the_request_is_a_failure(server: LiteratureServer) -> None:
    server.always = Reply(b"`countTotal` is unknown parameter", 400)
    async with opened(server, "ctgov") as literature:
        with pytest.raises(RetrieverError, match=r"ctgov: status 400: `countTotal` is unknown parameter"):
            await literature(["asthma"], 10)


@pytest.mark.parametrize(
    ("engine", "fault", "message"),
    [
        ("pubmed", Reply(MAINTENANCE), r"pubmed: the answer is not JSON .*\(3 attempts\)"),
        ("pubmed", Reply(BACKEND_FAILED), r"pubmed: error: Search Backend failed: Couldn't connect\. \(3 attempts\)"),
        ("pubmed", Reply(b'{"error":"API rate limit exceeded"}'), "none of esearch: API rate limit exceeded"),
        ("pubmed", Reply(ESEARCH_JSON[:-60]), "not JSON"),
        ("pubmed", Reply(b'{"esearchresult":{"count":"9","idlist":["1","2"]}}'), "from 0 has 2 of its 9 ids"),
        ("pubmed", Reply(b'{"esearchresult":{"count":"1","idlist":["1","2"]}}'), "from 0 has 2 of its 1 ids"),
        ("pubmed", Reply(RATE_EXCEEDED, 429), r"status 429: .*\[key\]"),
        ("pubmed", Reply(b"x", 500), "status 500: x"),
        ("pubmed", Reply(drop=True), "RemoteProtocolError"),
        ("ctgov", Reply(MAINTENANCE), "not JSON"),
        ("ctgov", Reply(STUDIES[:-10]), "not JSON"),
        ("ctgov", Reply(STUDIES.replace(b'"totalCount":2,', b"")), "no totalCount"),
        ("ctgov", Reply(STUDIES.replace(b":2,", b":3,")), "from 0 has 2 of its 3 studies"),
        ("ctgov", Reply(b"x", 503), "status 503: x"),
    ],
)
async def test_an_engine_that_fails_is_an_error_and_never_a_result(
    server: LiteratureServer, engine: str, fault: Reply, message: str, tmp_path: Path
) -> None:
    cache = {"cache": tmp_path / "cache.sqlite", "cache_mode": "record"}
    async with opened(server, engine, **cache) as literature:
        server.always = fault
        with pytest.raises(RetrieverError, match=message) as caught:
            await literature(["asthma"], 10)
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
        assert len(server.asked) == 3
        server.always = None
        assert len(ids((await literature(["asthma"], 10))[0])) == 10, "nothing of the failure was kept"
        server.faults.append(fault)
        assert len(ids((await literature(["stroke"], 10))[0])) == 10, "one failure is got over"


async def test_xml_that_is_cut_is_an_error(server: LiteratureServer) -> None:
    async with opened(server, retmode="xml") as literature:
        server.always = Reply(ESEARCH_XML[:-30])
        with pytest.raises(RetrieverError, match="not XML"):
            await literature(["asthma"], 10)


async def test_a_search_that_changes_between_its_pages_is_an_error(server: LiteratureServer) -> None:
    async with opened(server, page_size=10) as literature:
        server.faults.append(None)
        server.always = Reply(json.dumps({"esearchresult": {"count": "26", "idlist": list("12345")}}).encode())
        with pytest.raises(RetrieverError, match="has 26 records and had 25 a page ago"):
            await literature(["asthma"], 15)


async def test_a_page_without_a_way_to_the_next_is_an_error(server: LiteratureServer) -> None:
    async with opened(server, "ctgov", page_size=2) as literature:
        server.always = Reply(STUDIES.replace(b":2,", b":3,"))
        with pytest.raises(RetrieverError, match="2 of 3 studies are read, and there is no nextPageToken"):
            await literature(["asthma"], 10)
        assert len(ids((await literature(["asthma"], 2))[0])) == 2, "no more were wanted"


async def test_an_id_counts_once(server: LiteratureServer) -> None:
    async with opened(server) as literature:
        server.always = Reply(ESEARCH_JSON)
        (result,) = await literature(["asthma"], 10)
    assert ids(result) == ["31452104", "31437182"] and result.scores == (1.0, 0.5)


async def test_titles_on_request(server: LiteratureServer) -> None:
    record = records()[0]
    async with opened(server, titles=True) as literature:
        (result,) = await literature(["asthma"], 3000)
    assert (result.documents[0].id, result.documents[0].title) == (record.pmid, record.title)
    assert all(document.title and not document.text for document in result.documents)
    async with opened(server, "ctgov", titles=True) as literature:
        (result,) = await literature(["asthma"], 3000)
    first = result.documents[0]
    assert (first.id, first.title, first.text) == (record.nct, record.title, record.summary)


async def test_summaries_come_in_batches(server: LiteratureServer) -> None:
    async with opened(server, titles=True) as literature:
        server.literature = tuple(replace(record, pmid=str(n)) for n, record in enumerate(records() * 2, start=1))
        (result,) = await literature(["trial"], 3000)
    assert len(result.documents) == 400
    batches = [asked for asked in server.asked if "esummary" in asked.path]
    assert [len(asked.parameters["id"].split(",")) for asked in batches] == [200, 200]


@pytest.mark.parametrize(("engine", "topk"), [("pubmed", 0), ("pubmed", 10_000), ("ctgov", -1), ("ctgov", 10_001)])
async def test_topk_has_bounds(server: LiteratureServer, engine: str, topk: int) -> None:
    async with opened(server, engine) as literature:
        with pytest.raises(RetrieverError, match=rf"{engine}: topk={topk}; expected 1 to"):
            await literature(["asthma"], topk)


@pytest.mark.parametrize("queries", ["asthma", []])
async def test_queries_are_a_list(server: LiteratureServer, queries: Sequence[str]) -> None:
    async with opened(server) as literature:
        with pytest.raises(RetrieverError, match="expected a list of at least one query"):
            await literature(queries, 10)


async def test_equal_queries_are_asked_once_and_answered_each(server: LiteratureServer) -> None:
    async with opened(server) as literature:
        results = await literature(["asthma", " asthma\n", "pain"], 10)
    assert [result.query for result in results] == ["asthma", " asthma\n", "pain"]
    assert results[0].documents == results[1].documents and len(server.asked) == 2


@ENGINE
async def test_a_run_is_repeated_offline(server: LiteratureServer, engine: str, tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    asked = ["asthma", "nowhere", "(pain" if engine == "ctgov" else "pain", "  "]
    dated = question(pub_date="2001")
    async with opened(server, engine, cache=file, cache_mode="record", page_size=10, titles=True) as literature:
        recorded = [await literature(asked, 50), await literature.bound(dated)(asked, 50)]
        requests = len(server.asked)
        assert [await literature(asked, 50), await literature.bound(dated)(asked, 50)] == recorded
        assert len(server.asked) == requests
    config = LiteratureConfig(engine=engine, cache=file, cache_mode="replay", titles=True)  # pyright: ignore
    async with open_literature(config, {}) as literature:
        assert [await literature(asked, 50), await literature.bound(dated)(asked, 50)] == recorded
        for other in (literature(["asthma"], 51), literature.bound(question(pub_date="2002"))(["stroke"], 50)):
            with pytest.raises(RetrieverError, match=r"has no answer of .* record it first"):
                await other
    async with open_literature(replace(config, titles=False), {}) as literature:
        with pytest.raises(RetrieverError, match="has no answer"):
            await literature(["asthma"], 50)
    assert KEY.encode() not in file.read_bytes() and len(server.asked) == requests


async def test_a_cache_of_something_else_is_an_error(server: LiteratureServer, tmp_path: Path) -> None:
    file = tmp_path / "cache.sqlite"
    with closing(ReplayCache(file, "record")) as cache:
        cache.store(ReplayRequest("pubmed", "asthma", 10, {"until": "", "titles": 0}), b'{"documents": 5}')
    async with opened(server, cache=file, cache_mode="record") as literature:
        with pytest.raises(RetrieverError, match="none of a literature search"):
            await literature(["asthma"], 10)
    with pytest.raises(DataError, match="no such file"):
        opened(server, cache=tmp_path / "missing", cache_mode="replay")


@pytest.mark.parametrize(
    ("environ", "message"),
    [({"NCBI_API_KEY": "short"}, "holds no key"), ({"NCBI_API_KEY": "with a space in it"}, "holds no key")],
)
def test_a_key_that_is_none_is_refused_and_not_shown(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_literature(LiteratureConfig(), environ)
    assert environ["NCBI_API_KEY"] not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "environ", "seconds"),
    [("pubmed", {}, 3), ("pubmed", {"NCBI_API_KEY": " "}, 3), ("pubmed", ENVIRON, 1), ("ctgov", ENVIRON, 3)],
)
async def test_the_rate_goes_by_the_key(
    server: LiteratureServer, engine: str, environ: dict[str, str], seconds: int
) -> None:
    now = 0.0

    async def sleep(wait_s: float) -> None:
        nonlocal now
        now += wait_s
        await asyncio.sleep(0)

    config = LiteratureConfig(engine=engine, base_url=server.url, http=ServiceConfig(travel_s=0))  # pyright: ignore
    async with open_literature(config, environ, lambda: now, sleep) as literature:
        for number in range(11):
            await literature([f"asthma {number}"], 10)
    # 11 requests: 10 and 1, or 3 and 3 and 3 and 2.
    assert now == pytest.approx(seconds) and len(server.asked) == 11
    assert {asked.parameters.get("api_key") for asked in server.asked} == {KEY if seconds == 1 else None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "medline"}, "engine='medline' is unknown"),
        ({"page_size": 0}, "expected 1 to 10000"),
        ({"engine": "ctgov", "page_size": 1001}, "expected 1 to 1000"),
        ({"base_url": "http://eutils.example.org"}, "expected https"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    make: Callable[..., LiteratureConfig] = LiteratureConfig
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_settings_come_from_yaml(tmp_path: Path) -> None:
    values = {"engine": "ctgov", "cache": str(tmp_path / "c"), "cache_mode": "record", "http": {"rate": 0.8}}
    config = build(LiteratureConfig, values)
    assert (config.engine, config.cache, config.http) == ("ctgov", tmp_path / "c", ServiceConfig(rate=0.8))
    with pytest.raises(ConfigError, match="expected one of 'pubmed', 'ctgov'"):
        build(LiteratureConfig, {"engine": "pubmd"})


@given(st.text(alphabet=st.characters(), max_size=60))
def test_what_is_sent_is_clean_text(query: str) -> None:
    term = searched(query)
    assert term == term.strip() == searched(term)
    assert (term.encode("utf-8") and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in term)) or term == ""


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(queries=st.lists(st.text(alphabet=st.characters(), max_size=40), min_size=1, max_size=3))
def test_any_text_is_searched_for(server: LiteratureServer, queries: list[str]) -> None:
    async def run(engine: str) -> list[SearchResult]:
        async with opened(server, engine) as literature:
            return await literature(queries, 5)

    for engine in ENGINES:
        results = asyncio.run(run(engine))
        assert [result.query for result in results] == queries
