"""The three web search APIs: what is sent to each, and how its answer becomes documents. No network here.

A page of results becomes documents in this order: the answer box, the organic results, the related questions (the
last only after a page's organic results, so a page more never changes the documents before it). Published formats:

- SerpAPI: `GET /search.json?engine=google&q=&start=`, key in the query as `api_key`; `answer_box`,
  `organic_results`, `related_questions`, and `error`, which also stands in an answer that merely found nothing.
- Serper: `POST /search {"q", "num", "page"}`, key in the header `X-API-KEY`; `answerBox`, `organic`, `peopleAlsoAsk`.
- Google Custom Search: `GET /customsearch/v1?q=&num=&start=`, key in the query as `key` and the engine's id as `cx`;
  `items` and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from verl.errors import RetrieverError
from verl.types import Document

PAGE_RESULTS = 10

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Credential:
    """Something from the environment that goes with every request.

    Attributes:
        variable: where it is found.
        place: whether it goes into the query or is a header.
        name: of the query parameter or header.
        decides: whether answers depend on it, so that it must be known even where no request is sent.
    """

    variable: str
    place: Literal["query", "header"]
    name: str
    decides: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One request, without its credentials.

    Attributes:
        path: below the service's base URL.
        query: query parameters.
        body: JSON to POST; a GET when None.
    """

    path: str
    query: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, str | int] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """The documents of one page, and whether a further page may have more."""

    documents: tuple[Document, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Api:
    """One API.

    Attributes:
        call: the request for a query, a page number (from 0) and further parameters (`hl`, `gl`).
        parse: reads the JSON object of an answer with status 200; a `RetrieverError` says that it is no result.
        max_pages: pages of ten that can be asked for.
    """

    base_url: str
    credentials: tuple[Credential, ...]
    call: Callable[[str, int, Mapping[str, str]], Call]
    parse: Callable[[Json], Page]
    max_pages: int = 10


def error_reason(answer: object) -> str:
    """Return what an error answer of any of the three says, empty where it says nothing."""
    if not isinstance(answer, Mapping):
        return ""
    error = answer.get("error", answer.get("message", ""))
    message = error.get("message", "") if isinstance(error, Mapping) else error
    return shortened(message) if isinstance(message, str) else ""


def shortened(text: str) -> str:
    """Return a text from outside as it may stand in a message: one line, ASCII, at most 200 characters."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return line if len(line) <= 200 else f"{line[:197]}..."


def _serpapi_call(query: str, page: int, parameters: Mapping[str, str]) -> Call:
    return Call("/search.json", {"engine": "google", "q": query, "start": page * PAGE_RESULTS, **parameters})


def _serpapi_page(answer: Json) -> Page:
    metadata = answer.get("search_metadata")
    status = metadata.get("status") if isinstance(metadata, Mapping) else None
    # A search that found nothing is a success with an error text.
    if answer.get("error") is not None and status != "Success":
        raise RetrieverError(f"error: {error_reason(answer) or 'no reason given'}")
    if status not in (None, "Success"):
        raise RetrieverError(f"the search is {shortened(repr(status))}; expected 'Success'")
    if status is None and "organic_results" not in answer:
        raise RetrieverError("the answer has neither organic_results nor search_metadata")
    organic = list(_organic(answer, "organic_results"))
    boxes = _answer_box(answer.get("answer_box"))
    return Page((*boxes, *organic, *_questions(answer, "related_questions")), bool(organic))


def _serper_call(query: str, page: int, parameters: Mapping[str, str]) -> Call:
    return Call("/search", body={"q": query, "num": PAGE_RESULTS, "page": page + 1, **parameters})


def _serper_page(answer: Json) -> Page:
    if "organic" not in answer and "searchParameters" not in answer:
        reason = error_reason(answer)
        raise RetrieverError(f"error: {reason}" if reason else "the answer has neither organic nor searchParameters")
    organic = list(_organic(answer, "organic"))
    boxes = _answer_box(answer.get("answerBox"))
    return Page((*boxes, *organic, *_questions(answer, "peopleAlsoAsk")), bool(organic))


def _google_cse_call(query: str, page: int, parameters: Mapping[str, str]) -> Call:
    asked = {"q": query, "num": PAGE_RESULTS, "start": page * PAGE_RESULTS + 1, **parameters}
    return Call("/customsearch/v1", asked)


def _google_cse_page(answer: Json) -> Page:
    if answer.get("kind") != "customsearch#search" and "items" not in answer:
        reason = error_reason(answer)
        raise RetrieverError(f"error: {reason}" if reason else "the answer is no customsearch#search")
    queries = answer.get("queries")
    return Page(tuple(_organic(answer, "items")), isinstance(queries, Mapping) and "nextPage" in queries)


def _objects(answer: Json, key: str) -> Iterator[Json]:
    """Yield the objects of a list; a key that is missing is an empty list.

    Raises:
        RetrieverError: something else stands there.
    """
    found = answer.get(key)
    if found is None:
        return
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise RetrieverError(f"{key} is no list of objects")
    yield from found


def _organic(answer: Json, key: str) -> Iterator[Document]:
    for item in _objects(answer, key):
        title, text, link = _text(item, "title"), _text(item, "snippet"), _text(item, "link")
        if title or text:
            yield Document(link or _hashed(title, text), title, text)


def _answer_box(box: object) -> list[Document]:
    if not isinstance(box, Mapping):
        return []
    text = _text(box, "snippet") or _text(box, "answer") or _text(box, "result")
    return [_extra(_text(box, "title"), text, _text(box, "link"))] if text else []


def _questions(answer: Json, key: str) -> Iterator[Document]:
    for item in _objects(answer, key):
        question, text = _text(item, "question"), _text(item, "snippet")
        if question and text:
            yield _extra(question, text, _text(item, "link"))


def _extra(title: str, text: str, link: str) -> Document:
    """Return what is no organic result. It often quotes a page that is one too, so the link alone is no id."""
    return Document(f"{link}#{_hashed(title, text)}" if link else _hashed(title, text), title, text)


def _hashed(title: str, text: str) -> str:
    content = f"{title}\n{text}".encode()
    return f"web-{hashlib.sha256(content).hexdigest()[:16]}"


def _text(item: Json, key: str) -> str:
    """Return a text in one line; what is no character (an unpaired surrogate) becomes the replacement character."""
    value = item.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return " ".join(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


APIS: dict[str, Api] = {
    "serpapi": Api(
        "https://serpapi.com", (Credential("SERPAPI_API_KEY", "query", "api_key"),), _serpapi_call, _serpapi_page
    ),
    "serper": Api(
        "https://google.serper.dev", (Credential("SERPER_API_KEY", "header", "X-API-KEY"),), _serper_call, _serper_page
    ),
    "google_cse": Api(
        "https://www.googleapis.com",
        (Credential("GOOGLE_API_KEY", "query", "key"), Credential("GOOGLE_CSE_ID", "query", "cx", decides=True)),
        _google_cse_call,
        _google_cse_page,
    ),
}
