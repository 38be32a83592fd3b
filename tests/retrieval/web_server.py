"""A local server that speaks the formats of SerpAPI, Serper and Google Custom Search, with faults on demand."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

PER_PAGE = 10
Json = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """An answer in place of the right one.

    Attributes:
        delay_s: goes before it.
        drip_s: goes before every byte of the body.
        drop: close the connection instead.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0
    drop: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    moment: float
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Json


class WebServer:
    """Answers on a free port of this machine; use as a context manager.

    The query `whale` has `results` organic results; `nothing` has none. Faults are used up one per request, in order.
    A query that is `held` gets its answer when its event is set.
    """

    def __init__(self, results: int = 25) -> None:
        self.results = results
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.held: dict[str, threading.Event] = {}
        self.asked: list[Asked] = []
        self.key = "secret-KEY_0123456789"
        self.cse_id = "cse-id:0123456789"
        self.extra: Json = {}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet

            def do_GET(self) -> None:
                server._answer(self, {})

            def do_POST(self) -> None:
                server._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def environ(self) -> dict[str, str]:
        names = ("SERPAPI_API_KEY", "SERPER_API_KEY", "GOOGLE_API_KEY")
        return {**dict.fromkeys(names, self.key), "GOOGLE_CSE_ID": self.cse_id}

    def _answer(self, handler: BaseHTTPRequestHandler, body: Json) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            self.asked.append(Asked(time.monotonic(), parts.path, query, dict(handler.headers), body))
            fault = self.faults.popleft() if self.faults else self.always
        if fault is None:
            status, answer = self._right_answer(parts.path, query, handler, body)
            fault = Fault(status, json.dumps(answer).encode())
        held = self.held.get(str(body.get("q", query.get("q"))))
        if held is not None:
            held.wait(20)
        time.sleep(fault.delay_s)
        handler.close_connection = fault.drop
        if not fault.drop:
            handler.send_response(fault.status)
            for name, value in {"Content-Length": str(len(fault.body)), **fault.headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            try:
                _write(handler, fault)
            except OSError:  # the client went away, as some tests want it to
                handler.close_connection = True

    def _right_answer(
        self, path: str, query: dict[str, str], handler: BaseHTTPRequestHandler, body: Json
    ) -> tuple[int, Json]:
        if path == "/search.json":
            if query.get("api_key") != self.key:
                return 401, {"error": "Invalid API key."}
            return 200, self._serpapi(query["q"], int(query["start"]))
        if path == "/search":
            if handler.headers.get("X-API-KEY") != self.key:
                return 403, {"message": "Unauthorized.", "statusCode": 403}
            return 200, self._serper(body["q"], (body["page"] - 1) * body["num"], body["num"])
        if path == "/customsearch/v1":
            if (query.get("key"), query.get("cx")) != (self.key, self.cse_id):
                return 400, {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}
            return 200, self._google_cse(query["q"], int(query["start"]), int(query["num"]))
        return 404, {"error": "no such path"}

    def _hits(self, query: str, start: int, count: int) -> list[Json]:
        total = 0 if query == "nothing" else self.results
        return [
            {
                "position": number - start + 1,
                "title": f"{query} {number}",
                "link": f"https://example.org/{query}/{number}",
                "snippet": f"About {query},\nnumber {number}.",
            }
            for number in range(start, min(start + count, total))
        ]

    def _serpapi(self, query: str, start: int) -> Json:
        answer: Json = {"search_metadata": {"status": "Success", "id": "1"}, "search_parameters": {"q": query}}
        hits = self._hits(query, start, PER_PAGE)
        if not hits:
            return {**answer, "error": "Google hasn't returned any results for this query."}
        if start == 0:
            answer["answer_box"] = {"type": "organic_result", "title": "Whale", "snippet": "A mammal.", **_link(hits)}
            answer["related_questions"] = [
                {"question": "Is a whale a fish?", "snippet": "No.", "link": hits[1]["link"]},
                {"question": "Is a whale big?", "snippet": "Yes."},
            ]
        return {**answer, "organic_results": hits, **self.extra}

    def _serper(self, query: str, start: int, count: int) -> Json:
        hits = self._hits(query, start, count)
        answer: Json = {"searchParameters": {"q": query}, "organic": hits, "credits": 1}
        if start == 0 and hits:
            answer["answerBox"] = {"title": "Whale", "answer": "A mammal.", **_link(hits)}
            answer["peopleAlsoAsk"] = [
                {"question": "Is a whale a fish?", "snippet": "No.", "title": "Fish", "link": hits[1]["link"]},
                {"question": "Is a whale big?", "snippet": "Yes."},
            ]
        return {**answer, **self.extra}

    def _google_cse(self, query: str, start: int, count: int) -> Json:
        hits = self._hits(query, start - 1, count)
        queries: Json = {"request": [{"startIndex": start}]}
        if start - 1 + count < self.results and hits:
            queries["nextPage"] = [{"startIndex": start + count}]
        answer: Json = {"kind": "customsearch#search", "queries": queries}
        return {**answer, "items": hits, **self.extra} if hits else answer


def _write(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    step = 1 if fault.drip_s else max(1, len(fault.body))
    for at in range(0, len(fault.body), step):
        time.sleep(fault.drip_s)
        handler.wfile.write(fault.body[at : at + step])
        handler.wfile.flush()


def _link(hits: list[Json]) -> Json:
    return {"link": hits[0]["link"]}
