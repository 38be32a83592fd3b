"""The HTTP contract of the retriever, once for both sides.

The published one, which s3 and Search-R1 clients speak: `POST /retrieve {"queries": [str], "topk"?: int,
"return_scores"?: bool}` is answered by `{"result": [[{"document": {...}, "score": float}]]}`, or by bare documents
`{"result": [[{...}]]}` when `return_scores` is false. A document has `id`, `contents` (quoted title, newline, text),
`title` and `text`; `"ids_only": true`, which is ours, leaves out all but `id`. Errors are ours: a status of 4xx or 5xx
and `{"error": {"code", "message", "query_index"?}}`; where the engine fails for some of the queries, also
`"query_errors": [{"query_index", "message"}]` with all of those.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NoReturn

import orjson

from verl.errors import ConfigError, RetrieverError, SearchAgentError
from verl.types import Document, SearchResult


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_body_bytes: size of the body.
        max_queries: queries of a request.
        max_query_chars: characters of a query.
        max_topk: documents of a query, whatever the engine could give.
        max_documents: `topk` times the number of queries; bounds the size of an answer.
    """

    max_body_bytes: int = 8 * 1024 * 1024
    max_queries: int = 1024
    max_query_chars: int = 4096
    max_topk: int = 4096
    max_documents: int = 32768

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise ConfigError(f"server {item.name}={getattr(self, item.name)}; expected at least 1")


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """A valid request."""

    queries: tuple[str, ...]
    topk: int
    return_scores: bool = False
    ids_only: bool = False


_KEYS = tuple(item.name for item in fields(RetrieveRequest))
_AFTER_ID = b',"contents":'


class RefusedRequest(SearchAgentError):
    """A request that is not answered as asked; it gets `status` and the JSON of `error_body`.

    Attributes:
        query_index: position of the query at fault, None when it is not one query's fault.
        retry_after_s: seconds after which the same request may succeed, None when it cannot.
        query_errors: all queries at fault and their reasons, where several may be.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        query_index: int | None = None,
        retry_after_s: int | None = None,
        query_errors: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.query_index = query_index
        self.retry_after_s = retry_after_s
        self.query_errors = query_errors


def error_body(refused: RefusedRequest) -> dict[str, Any]:
    """Return the JSON object that goes with an error status."""
    error: dict[str, Any] = {"code": refused.code, "message": str(refused)}
    if refused.query_index is not None:
        error["query_index"] = refused.query_index
    if refused.query_errors is not None:
        errors = refused.query_errors.items()
        error["query_errors"] = [{"query_index": at, "message": message} for at, message in errors]
    return {"error": error}


class Rendered(NamedTuple):
    """One query's result as it is sent: each document and each score a piece of JSON, best first."""

    documents: tuple[bytes, ...]
    scores: tuple[bytes, ...]

    def head(self, topk: int) -> Rendered:
        """Return the best `topk`."""
        return self if topk >= len(self.documents) else Rendered(self.documents[:topk], self.scores[:topk])


def render(result: SearchResult) -> Rendered:
    """Turn a result into JSON once, for every request that wants it.

    Raises:
        RetrieverError: a score is not finite, or a text holds an unpaired surrogate; JSON has neither.
    """
    if not math.isfinite(math.fsum(map(abs, result.scores))):
        raise RetrieverError(f"query {_shown(result.query)}: the engine gave scores that are not finite")
    try:
        documents = tuple(_exact(orjson.dumps(_fields(document))) for document in result.documents)
    except TypeError as error:
        raise RetrieverError(f"query {_shown(result.query)}: a document cannot be sent ({error})") from error
    scores = orjson.dumps(result.scores)[1:-1].split(b",") if result.scores else ()
    return Rendered(documents, tuple(scores))


def _fields(document: Document) -> dict[str, str]:
    return {"id": document.id, "contents": document.contents, "title": document.title, "text": document.text}


def _exact(made: bytes) -> bytes:
    """Copy what orjson made: it leaves its whole buffer, several times as large, to what may be kept for long."""
    return bytes(memoryview(made))


def parse_request(body: bytes, limits: RequestLimits, default_topk: int, max_topk: int, extent: str) -> RetrieveRequest:
    """Read the body of `POST /retrieve`.

    Args:
        default_topk: used when the request names none.
        max_topk: the largest `topk` of the engine.
        extent: what sets `max_topk`, for messages: "the corpus's 8 documents".

    Raises:
        RefusedRequest: with status 400 when the body is no JSON object, else 422.
    """
    fields_ = _request_fields(body)
    _check_keys(fields_)
    queries = _queries(fields_.get("queries"), "queries" in fields_, limits)
    topk = fields_.get("topk")
    topk = default_topk if topk is None else topk
    if isinstance(topk, float) and topk.is_integer():  # JSON does not tell 2.0 from 2
        topk = int(topk)
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise _invalid("topk", f"topk is {_shown(topk)}; expected an integer of at least 1")
    if topk > max_topk:
        raise _invalid("topk", f"topk={_shown(topk)} exceeds {extent}; lower topk")
    if topk > limits.max_topk or topk * len(queries) > limits.max_documents:
        raise _invalid(
            "topk",
            f"topk={topk} for {len(queries)} queries; expected at most {limits.max_topk} for a query and "
            f"{limits.max_documents} documents for a request, so lower topk or send several requests",
        )
    return RetrieveRequest(queries, topk, _flag(fields_, "return_scores"), _flag(fields_, "ids_only"))


def _flag(received: Mapping[str, Any], name: str) -> bool:
    value = received.get(name, False)
    if not isinstance(value, bool):
        raise _invalid(name, f"{name} is {_shown(value)}; expected true or false")
    return value


def query_fault(query: Any, max_chars: int) -> tuple[str, str] | None:
    """Return `(code, what is wrong with the query)`, or None when it can be searched for."""
    if not isinstance(query, str):
        return "query_type", f"is {_shown(query)}; expected a string"
    if not query.strip():
        return "blank_query", "is blank; expected at least one character that is no space"
    if len(query) > max_chars:
        return "query_too_long", f"has {len(query)} characters; expected at most {max_chars}, so shorten it"
    try:
        query.encode("utf-8")
    except UnicodeEncodeError:
        return "query_encoding", "holds an unpaired surrogate (\\ud800 to \\udfff), which is no character; remove it"
    return None


def request_body(request: RetrieveRequest) -> bytes:
    """Return the body that a client sends."""
    asked = {"queries": request.queries, "topk": request.topk, "return_scores": request.return_scores}
    return orjson.dumps(asked | ({"ids_only": True} if request.ids_only else {}))  # others' servers do not know it


def response_body(results: Sequence[Rendered], return_scores: bool, ids_only: bool = False) -> bytes:
    """Return the body that the server answers with."""
    if ids_only:
        results = [Rendered(tuple(map(_id_alone, result.documents)), result.scores) for result in results]
    return b'{"result":[%b]}' % b",".join([_hits(result, return_scores) for result in results])


def _id_alone(document: bytes) -> bytes:
    """Cut a rendered document after its id; within a piece of JSON text the quotes would have backslashes."""
    return document[: document.index(_AFTER_ID)] + b"}"


def parse_response(body: bytes, queries: Sequence[str], topk: int, ids_only: bool = False) -> list[SearchResult]:
    """Read what a server answered to a request with `return_scores` true.

    Documents without `title` and `text`, as published servers send them, are split from their `contents`.

    Args:
        ids_only: documents may be ids alone, and whatever else they have is dropped.

    Raises:
        RetrieverError: the answer is not what the contract says; the message is the reason.
    """
    answer = _answer(body)
    rows = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or len(rows) != len(queries):
        found = f"{len(rows)} results" if isinstance(rows, list) else f"result={_shown(rows)}"
        raise RetrieverError(f"the answer has {found}; expected a list of {len(queries)}, one for each query")
    read = _id_document if ids_only else _document
    return [_search_result(query, hits, topk, read) for query, hits in zip(queries, rows, strict=True)]


def _answer(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass  # other servers send NaN, for example; what is wrong with that is said where it stands
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RetrieverError(f"the answer is not JSON ({error}); expected an object with result") from error


def _request_fields(body: bytes) -> dict[str, Any]:
    """Read the JSON object: fast where it looks right, else again with a parser that says what is wrong."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _json_object(body)
    # A float may be an integer that was too large for the fast parser.
    return value if type(value) is dict and type(value.get("topk")) is not float else _json_object(body)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RefusedRequest(
            400, "encoding", f"the body is not UTF-8 at byte {error.start}; send JSON in UTF-8"
        ) from error
    except RecursionError as error:
        raise RefusedRequest(400, "json", "the body is nested too deeply; send a flat JSON object") from error
    except ValueError as error:
        raise RefusedRequest(400, "json", f"the body is not JSON ({error}); send a JSON object") from error
    if not isinstance(value, dict):
        raise RefusedRequest(400, "json", f"the body is {_shown(value)}; send a JSON object with queries")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_keys(received: dict[str, Any]) -> None:
    for key in received:
        if key not in _KEYS:
            # Comparing takes time that grows with the key, and a body may be one long key.
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.4) if len(key) <= 64 else []
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_KEYS)}"
            raise _invalid("unknown_key", f"unknown key {_shown(key)}; {hint}")


def _queries(value: Any, given: bool, limits: RequestLimits) -> tuple[str, ...]:
    if not isinstance(value, list):
        found = f"is {_shown(value)}" if given else "is missing"
        raise _invalid("queries", f"queries {found}; expected a list of strings")
    if not value:
        raise _invalid("queries", "queries is empty; expected at least one query")
    if len(value) > limits.max_queries:
        raise _invalid(
            "queries", f"{len(value)} queries came; expected at most {limits.max_queries}, so send several requests"
        )
    for index, query in enumerate(value):
        fault = query_fault(query, limits.max_query_chars)
        if fault:
            raise _invalid(fault[0], f"queries[{index}] {fault[1]}", index)
    return tuple(value)


def _invalid(code: str, message: str, query_index: int | None = None) -> RefusedRequest:
    return RefusedRequest(422, code, message, query_index)


def _shown(value: Any) -> str:
    """Show a value in a message: its repr, in ASCII and short, or its type where the repr is long or deep."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'JSON object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hits(result: Rendered, return_scores: bool) -> bytes:
    if not return_scores:
        return b"[%b]" % b",".join(result.documents)
    pairs = zip(result.documents, result.scores, strict=True)
    return b"[%b]" % b",".join([b'{"document":%b,"score":%b}' % pair for pair in pairs])


def _search_result(query: str, hits: Any, topk: int, read: Callable[[dict[str, Any]], Document]) -> SearchResult:
    if not isinstance(hits, list) or len(hits) > topk:
        found = f"{len(hits)} hits" if isinstance(hits, list) else _shown(hits)
        raise RetrieverError(f"the answer has {found} for a query; expected a list of at most topk={topk}")
    pairs = [_hit(hit, read) for hit in hits]
    return SearchResult(query, tuple(doc for doc, _ in pairs), tuple(score for _, score in pairs))


def _hit(hit: Any, read: Callable[[dict[str, Any]], Document]) -> tuple[Document, float]:
    document = hit.get("document") if isinstance(hit, dict) else None
    if not isinstance(document, dict):
        raise RetrieverError(f"a hit is {_shown(hit)}; expected an object with document and score")
    score = hit.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise RetrieverError(f"a hit has score={_shown(score)}; expected a finite number")
    return read(document), float(score)


def _id_document(received: dict[str, Any]) -> Document:
    id = received.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RetrieverError(f"a document has id={_shown(id)}; expected a string")
    return Document(str(id), "", "")


def _document(received: dict[str, Any]) -> Document:
    id, title, text = _id_document(received).id, received.get("title"), received.get("text")
    if isinstance(title, str) and isinstance(text, str):
        return Document(id, title, text)
    contents = received.get("contents")
    if not isinstance(contents, str):
        raise RetrieverError(f"document {_shown(id)} has contents={_shown(contents)}; expected a string")
    return Document.from_contents(id, contents)
