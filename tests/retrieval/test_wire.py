from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import RetrieverError
from verl.retrieval.metrics import resident_bytes
from verl.retrieval.wire import (
    RefusedRequest,
    Rendered,
    RequestLimits,
    RetrieveRequest,
    error_body,
    parse_request,
    parse_response,
    render,
    request_body,
    response_body,
)
from verl.types import Document, SearchResult

LIMITS = RequestLimits(max_queries=4, max_query_chars=20, max_topk=10, max_documents=24)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RESULTS = st.lists(
    st.tuples(st.builds(Document, TEXT, TEXT, TEXT), st.floats(allow_nan=False, allow_infinity=False, width=32)),
    max_size=4,
).map(lambda hits: SearchResult("q", tuple(doc for doc, _ in hits), tuple(score for _, score in hits)))


def parse(body: bytes, limits: RequestLimits = LIMITS) -> RetrieveRequest:
    return parse_request(body, limits, default_topk=3, max_topk=8, extent="the corpus's 8 documents")


def plain_hit(document: Document) -> dict[str, str]:
    return {"id": document.id, "contents": document.contents, "title": document.title, "text": document.text}


@given(st.lists(RESULTS, max_size=3))
def test_a_rendered_answer_is_the_contracts_json(results: list[SearchResult]) -> None:
    rendered = [render(result) for result in results]
    assert json.loads(response_body(rendered, False)) == {
        "result": [[plain_hit(document) for document in result.documents] for result in results]
    }
    assert json.loads(response_body(rendered, True)) == {
        "result": [
            [
                {"document": plain_hit(document), "score": score}
                for document, score in zip(result.documents, result.scores, strict=True)
            ]
            for result in results
        ]
    }


@given(st.lists(RESULTS, min_size=1, max_size=3))
def test_what_is_sent_is_what_arrives(results: list[SearchResult]) -> None:
    body = response_body([render(result) for result in results], True)
    assert parse_response(body, ["q"] * len(results), 4) == results


@given(st.lists(RESULTS, min_size=1, max_size=3))
def test_ids_alone_arrive_where_they_are_asked_for(results: list[SearchResult]) -> None:
    rendered, queries = [render(result) for result in results], ["q"] * len(results)
    ids = [[{"id": document.id} for document in result.documents] for result in results]
    assert json.loads(response_body(rendered, False, ids_only=True)) == {"result": ids}
    bare = [replace(r, documents=tuple(Document(d.id, "", "") for d in r.documents)) for r in results]
    assert parse_response(response_body(rendered, True, ids_only=True), queries, 4, ids_only=True) == bare
    # A server that does not know the wish sends everything.
    assert parse_response(response_body(rendered, True), queries, 4, ids_only=True) == bare


def test_a_document_of_an_id_alone_is_refused_where_its_text_is_wanted() -> None:
    body = response_body(
        [render(SearchResult("q", (Document("7", 'x","contents":', "y"),), (1.0,)))], True, ids_only=True
    )
    assert json.loads(body) == {"result": [[{"document": {"id": "7"}, "score": 1.0}]]}
    with pytest.raises(RetrieverError, match="document '7' has contents=None"):
        parse_response(body, ["q"], 1)


@given(RESULTS, st.integers(0, 6))
def test_the_head_of_a_rendered_result_is_the_rendered_head(result: SearchResult, topk: int) -> None:
    head = SearchResult("q", result.documents[:topk], result.scores[:topk])
    assert render(result).head(topk) == render(head)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_json_lacks_is_an_error(score: float) -> None:
    document = Document("1", "t", "x")
    with pytest.raises(RetrieverError, match="query 'q': the engine gave scores that are not finite"):
        render(SearchResult("q", (document, document), (1.0, score)))


def test_a_document_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RetrieverError, match="query 'q': a document cannot be sent"):
        render(SearchResult("q", (Document("1", "t", "\ud800"),), (1.0,)))


def test_a_request_is_read_as_it_was_written() -> None:
    asked = RetrieveRequest(("a", "ü日本"), 5, True)
    assert parse(request_body(asked)) == asked
    assert json.loads(request_body(asked)).keys() == {"queries", "topk", "return_scores"}, "as others' servers know it"
    assert parse(request_body(replace(asked, ids_only=True))) == replace(asked, ids_only=True)
    assert parse(b'{"queries": ["a"]}') == RetrieveRequest(("a",), 3, False)


@pytest.mark.parametrize(
    ("queries", "topk", "reason"),
    [
        (1, 9, "topk=9 exceeds the corpus's 8 documents"),
        (4, 7, "topk=7 for 4 queries; expected at most 10 for a query and 24 documents for a request"),
    ],
)
def test_topk_is_bounded(queries: int, topk: int, reason: str) -> None:
    with pytest.raises(RefusedRequest, match=reason):
        parse(json.dumps({"queries": ["a"] * queries, "topk": topk}).encode())


def test_a_large_index_does_not_make_large_answers() -> None:
    with pytest.raises(RefusedRequest, match="topk=11 for 1 queries; expected at most 10 for a query"):
        parse_request(b'{"queries": ["a"], "topk": 11}', LIMITS, 3, 10**9, "the corpus's 1000000000 documents")


def test_one_long_key_is_refused_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(RefusedRequest, match="unknown key 'qqq"):
        parse(b'{"' + b"q" * 8_000_000 + b'": 1}')
    assert time.perf_counter() - start < 5.0  # comparing it with the known keys would take minutes


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**19, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
requests = st.fixed_dictionaries(
    {"queries": st.lists(st.text(max_size=25) | values, max_size=5)},
    optional={
        "topk": st.integers(-1, 12) | values,
        "return_scores": st.booleans() | values,
        "ids_only": st.booleans() | values,
        "x": values,
    },
)


@given(requests)
def test_a_request_is_valid_if_and_only_if_it_says_so(request: dict[str, Any]) -> None:
    queries, topk, scores, ids = (request.get(name) for name in ("queries", "topk", "return_scores", "ids_only"))
    valid = (
        "x" not in request
        and 1 <= len(queries) <= 4
        and all(isinstance(q, str) and q.strip() and len(q) <= 20 for q in queries)
        and all(not any("\ud800" <= c <= "\udfff" for c in q) for q in queries)
        and (topk is None or (type(topk) in (int, float) and topk in range(1, 9) and topk * len(queries) <= 24))
        and ("return_scores" not in request or type(scores) is bool)
        and ("ids_only" not in request or type(ids) is bool)
    )
    try:
        parsed = parse(json.dumps(request).encode())
    except RefusedRequest:
        assert not valid
    else:
        assert valid and parsed == RetrieveRequest(tuple(queries), topk or 3, bool(scores), bool(ids))


def test_an_error_names_all_queries_at_fault() -> None:
    refused = RefusedRequest(502, "query_failed", "down", 1, query_errors={1: "down", 3: "slow"})
    assert error_body(refused) == {
        "error": {
            "code": "query_failed",
            "message": "down",
            "query_index": 1,
            "query_errors": [{"query_index": 1, "message": "down"}, {"query_index": 3, "message": "slow"}],
        }
    }


def test_no_result_is_an_empty_list() -> None:
    assert json.loads(response_body([Rendered((), ())], True)) == {"result": [[]]}


def test_a_rendered_result_takes_no_more_memory_than_its_bytes() -> None:
    result = SearchResult("q", (Document("1", "t", "x" * 500),), (1.0,))
    before = resident_bytes()
    kept = [render(result) for _ in range(20_000)]
    grown = resident_bytes() - before
    assert grown < 3 * sum(len(hits.documents[0]) for hits in kept)
