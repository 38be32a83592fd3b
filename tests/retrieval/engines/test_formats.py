"""Answers as the services give them, right and wrong, without a network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.engines.literature_server import BACKEND_FAILED, ESEARCH_JSON, ESEARCH_XML, MAINTENANCE, STUDIES
from verl.retrieval.engines import ctgov, pubmed
from verl.retrieval.engines.pubmed import Page, Summary
from verl.retrieval.engines.service import Unusable
from verl.types import Document

BILLION_LAUGHS = (
    '<!DOCTYPE eSearchResult [<!ENTITY a "'
    + "x" * 1000
    + '">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 100}">' for i in range(5))
    + "]><eSearchResult><Count>&f;</Count></eSearchResult>"
)


def test_recorded_answers() -> None:
    ids = ("31452104", "31437182", "31452104")
    assert pubmed.read_json(ESEARCH_JSON.decode()) == Page(3, ids)
    assert pubmed.read_xml(ESEARCH_XML.decode()) == Page(3, ids)
    found = ctgov.read_page(STUDIES.decode())
    assert found.documents == (
        Document("NCT04852770", "A Study of Asthma", "Line one. Line two."),
        Document("NCT01728545", "", ""),
    )
    assert (found.total, found.next) == (2, "")


def esearch(**result: object) -> str:
    return json.dumps({"header": {}, "esearchresult": result})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON .*starts with: nothing"),
        (ESEARCH_JSON[:-40].decode(), "not JSON"),
        (MAINTENANCE.decode(), "not JSON .*starts with: <!DOCTYPE html>"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list; expected an object"),
        ("{}", r"none of esearch: \{\}"),
        ('{"error": "API rate limit exceeded"}', "none of esearch: API rate limit exceeded"),
        ('{"esearchresult": []}', "none of esearch"),
        (BACKEND_FAILED.decode(), "error: Search Backend failed: Couldn't connect"),
        (esearch(ERROR="Invalid db name specified: x"), "error: Invalid db name"),
        (esearch(ERROR="a\nb" + "c" * 500), r"error: a b[c]+\.\.\.$"),
        (esearch(ERROR=""), "no reason given"),
        (esearch(count="3"), "no idlist"),
        (esearch(count="3", idlist={"1": 2}), "no idlist"),
        (esearch(idlist=[]), "count='None'; expected a number"),
        (esearch(count="-1", idlist=[]), "count='-1'"),
        (esearch(count=True, idlist=[]), "count='True'"),
        (esearch(count="1", idlist=["12a"]), "the id '12a' is no PMID"),
        (esearch(count="1", idlist=[None]), "the id 'None' is no PMID"),
    ],
)
def test_json_that_is_no_answer(text: str, message: str) -> None:
    with pytest.raises(Unusable, match=message) as caught:
        pubmed.read_json(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not XML .*starts with: nothing"),
        (ESEARCH_XML[:-40].decode(), "not XML"),
        (MAINTENANCE.decode(), "html without IdList|not XML"),
        ("<eSearchResult><Count>3</Count></eSearchResult>", "without IdList"),
        ("<other><IdList/></other>", "a other without IdList, expected eSearchResult"),
        ("<eSearchResult><IdList/></eSearchResult>", "count='None'"),
        ("<eSearchResult><Count>1</Count><IdList><Id>x</Id></IdList></eSearchResult>", "'x' is no PMID"),
        ("<eSearchResult><ERROR>Search Backend failed</ERROR></eSearchResult>", "error: Search Backend failed"),
        ("<eSearchResult><ERROR/></eSearchResult>", "no reason given"),
        ("<a>" * 100_000, "not XML"),
        ("<a>\x00</a>", "not XML"),
        (BILLION_LAUGHS, "not XML|without IdList"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><eSearchResult>&b;</eSearchResult>', "not XML|without"),
    ],
)
def test_xml_that_is_no_answer(text: str, message: str) -> None:
    with pytest.raises(Unusable, match=message) as caught:
        pubmed.read_xml(text)
    assert "root:" not in str(caught.value)


def test_a_term_that_holds_nothing_finds_nothing() -> None:
    error = "Empty term and query_key - nothing todo"
    assert pubmed.read_json(esearch(ERROR=error)) == Page(0, ())
    assert pubmed.read_xml(f"<eSearchResult><ERROR>{error}</ERROR></eSearchResult>") == Page(0, ())


def test_numbers_may_be_numbers() -> None:
    assert pubmed.read_json(esearch(count=1, idlist=[31452104])) == Page(1, ("31452104",))


def summary(**result: object) -> str:
    return json.dumps({"header": {}, "result": result})


def test_summaries() -> None:
    text = summary(
        uids=["1", "2"],
        **{
            "1": {"uid": "1", "title": " A\n title ", "pubdate": "2020 Spring", "sortpubdate": "2020/03/01 00:00"},
            "2": {"uid": "2", "error": "cannot get document summary"},
        },
    )
    assert pubmed.read_summaries(["1", "2"], text) == {"1": Summary("A title", "2020/03/01"), "2": Summary("", "")}
    with pytest.raises(Unusable, match="nothing about 1 of 3 records, the first is 3"):
        pubmed.read_summaries(["1", "2", "3"], text)
    with pytest.raises(Unusable, match="none of esummary: Invalid uid"):
        pubmed.read_summaries(["1"], '{"error": "Invalid uid 1 at position=0"}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("null", "a JSON NoneType"),
        (STUDIES[:-9].decode(), "not JSON"),
        (MAINTENANCE.decode(), "starts with: <!DOCTYPE html>"),
        ("{}", r"no list of studies: \{\}"),
        ('{"studies": {}}', "no list of studies"),
        ('{"studies": [], "totalCount": "3"}', "totalCount is no number"),
        ('{"studies": [], "totalCount": -3}', "totalCount is no number"),
        ('{"studies": [], "nextPageToken": 3}', "nextPageToken no text"),
        ('{"studies": [{}]}', "has no nctId"),
        ('{"studies": [null]}', "has no nctId"),
        ('{"studies": [{"protocolSection": {"identificationModule": {"nctId": " "}}}]}', "has no nctId"),
    ],
)
def test_studies_that_are_no_answer(text: str, message: str) -> None:
    with pytest.raises(Unusable, match=message):
        ctgov.read_page(text)


READERS: tuple[Callable[[str], object], ...] = (
    pubmed.read_json,
    pubmed.read_xml,
    ctgov.read_page,
    lambda text: pubmed.read_summaries(["1"], text),
)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("esearchresult", "count", "idlist", "ERROR", "studies", "totalCount", "result", "1")),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.text() | NESTED.map(json.dumps))
def test_a_reader_reads_or_says_that_it_cannot(text: str) -> None:
    for read in READERS:
        with contextlib.suppress(Unusable):  # and nothing else
            read(text)
