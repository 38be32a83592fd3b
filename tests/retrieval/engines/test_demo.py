"""The made-up literature's Boolean search against an independent evaluation, and the server's two formats."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.retrieval.engines.demo_records import QuerySyntaxError, Record, records, search
from verl.retrieval.engines.demo_server import DemoServer
from verl.services import free_port

LITERATURE = records()
WORDS = ("asthma", "stroke", "aspirin", "pain", "patients", "nowhere")


def pmids(query: str, until: str = "", strict: bool = False) -> list[str]:
    return [record.pmid for record in search(query, LITERATURE, until, strict)]


def having(*words: str) -> list[str]:
    """All of the words, by Python's own substring search of the title."""
    return [record.pmid for record in LITERATURE if all(word in record.title.lower() for word in words)]


def test_the_literature_is_what_it_says() -> None:
    assert len(LITERATURE) == 8 * 5 * 5
    assert len({record.pmid for record in LITERATURE}) == len({record.nct for record in LITERATURE}) == 200
    assert len(having("asthma")) == 25 and len(having("asthma", "aspirin")) == 5
    assert {record.date[:4] for record in LITERATURE} == {str(year) for year in range(1990, 2020)}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("asthma", having("asthma")),
        ("ASTHMA", having("asthma")),
        ("asthma aspirin", having("asthma", "aspirin")),
        ("asthma AND aspirin AND pain", having("asthma", "aspirin", "pain")),
        ('"heart failure"', having("heart failure")),
        ('"failure heart"', []),
        ('"heart failure', having("heart failure")),
        ("asthma[MeSH Terms] AND pain[tiab]", having("asthma", "pain")),
        ("(asthma) AND ()", having("asthma")),
        ("((asthma AND pain", having("asthma", "pain")),
        ("asthma)) AND pain", having("asthma", "pain")),
        ("placebo & care", having("placebo & care")),
        ("asthma # pain", having("asthma", "pain")),
        ("", []),
        ("() AND ( OR )", []),
        ("AND OR NOT", []),
        ("哮喘", []),
    ],
)
def test_queries(query: str, expected: list[str]) -> None:
    assert pmids(query) == expected


def test_operators_go_from_left_to_right() -> None:
    either = set(having("asthma")) | set(having("stroke"))
    assert set(pmids("asthma OR stroke AND pain")) == either & set(having("pain"))
    assert set(pmids("asthma OR (stroke AND pain)")) == set(having("asthma")) | set(having("stroke", "pain"))
    assert set(pmids("asthma NOT pain")) == set(having("asthma")) - set(having("pain"))
    assert len(pmids("NOT asthma")) == 175


Tree = str | tuple


def trees() -> st.SearchStrategy[Tree]:
    leaves = st.sampled_from(WORDS)
    return st.recursive(leaves, lambda inner: st.tuples(st.sampled_from(("AND", "OR", "NOT")), inner, inner))


def rendered(tree: Tree) -> str:
    if isinstance(tree, str):
        return tree
    operator, left, right = tree
    return f"({rendered(left)} {operator} {rendered(right)})"


def holds(tree: Tree, record: Record) -> bool:
    if isinstance(tree, str):
        return tree in f"{record.title} {record.summary}".lower()
    operator, left, right = tree
    if operator == "OR":
        return holds(left, record) or holds(right, record)
    return holds(left, record) and holds(right, record) == (operator == "AND")


@given(trees())
def test_any_expression_matches_what_python_says(tree: Tree) -> None:
    assert pmids(rendered(tree)) == [record.pmid for record in LITERATURE if holds(tree, record)]


@given(st.text(max_size=200))
def test_any_text_is_a_query(text: str) -> None:
    assert set(pmids(text)) <= {record.pmid for record in LITERATURE}


def test_a_date_includes_its_day_month_or_year() -> None:
    record = LITERATURE[0]
    for until in (record.date, record.date[:7], record.date[:4]):
        assert record.pmid in pmids("asthma", until)
    assert record.pmid not in pmids("asthma", "1990")
    assert len(pmids("asthma", "1999/12/31")) == sum(entry.date < "2000" for entry in LITERATURE[:25])


@pytest.mark.parametrize("query", ["asthma [tiab]", "(asthma", "asthma)", ")("])
def test_a_strict_service_refuses_what_it_cannot_parse(query: str) -> None:
    with pytest.raises(QuerySyntaxError):
        pmids(query, strict=True)
    assert pmids("(asthma) AND pain", strict=True) == having("asthma", "pain")


def test_deep_parentheses_and_a_long_query_are_read() -> None:
    assert pmids("(" * 50_000 + "asthma" + ")" * 50_000) == having("asthma")
    assert pmids("asthma OR pain OR " * 6_000 + "asthma") == pmids("asthma OR pain")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with DemoServer() as server:
        yield server.url


def get(address: str, **parameters: str) -> str:
    with urlopen(f"{address}?{urlencode(parameters)}") as answer:
        return answer.read().decode()


def test_both_formats_are_those_of_the_services(url: str) -> None:
    asked = {"db": "pubmed", "term": "asthma", "retmax": "2", "retstart": "1"}
    result = json.loads(get(f"{url}/entrez/eutils/esearch.fcgi", **asked, retmode="json"))["esearchresult"]
    assert (result["count"], result["idlist"]) == ("25", having("asthma")[1:3])
    xml = get(f"{url}/entrez/eutils/esearch.fcgi", **asked)
    assert f"<Count>25</Count><RetMax>2</RetMax><RetStart>1</RetStart><IdList><Id>{having('asthma')[1]}</Id>" in xml
    page = json.loads(get(f"{url}/api/v2/studies", **{"query.term": "asthma", "pageSize": "10", "countTotal": "true"}))
    assert (page["totalCount"], len(page["studies"]), page["nextPageToken"]) == (25, 10, "from-10")
    assert page["studies"][0] == {"protocolSection": {"identificationModule": {"nctId": LITERATURE[0].nct}}}


def test_the_server_keeps_its_rate() -> None:
    with DemoServer(rate=2) as server:
        address = f"{server.url}/api/v2/studies"
        assert [json.loads(get(address, **{"query.term": "pain"}))["studies"] != [] for _ in range(2)] == [True, True]
        with pytest.raises(OSError, match="429"):
            get(address, **{"query.term": "pain"})


def test_it_runs_as_a_module() -> None:
    port = free_port()
    command = [sys.executable, "-m", "verl.retrieval.engines.demo_server", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"200 records at http://127.0.0.1:{port}" in process.stderr.readline()
        found = get(f"http://127.0.0.1:{port}/entrez/eutils/esearch.fcgi", db="pubmed", term="asthma", api_key="any")
        process.send_signal(signal.SIGINT)
        assert "stopped after 1 requests" in process.stderr.read()
    assert "<Count>25</Count>" in found and process.returncode == 0
