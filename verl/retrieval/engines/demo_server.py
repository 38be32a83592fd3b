"""A local server that speaks the formats of E-utilities and ClinicalTrials.gov over a small made-up literature.

    python -m verl.retrieval.engines.demo_server --port 8123

Then `base_url=http://127.0.0.1:8123` in `LiteratureConfig` for either engine. It answers 429 above its rate, as NCBI
does; tests and benchmarks give it faults.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlsplit
from xml.sax.saxutils import escape

from verl.retrieval.engines.demo_records import QuerySyntaxError, Record, records, search

logger = logging.getLogger(__name__)

Json = Mapping[str, object]
_MAX_START = 9_998
_MAX_PAGE = 1_000
_STUDY_PARAMETERS = ("query.term", "pageSize", "pageToken", "countTotal", "fields", "format")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it arrived.

    Attributes:
        moment: of arrival, on the clock `time.monotonic`.
        parameters: of address and form.
    """

    moment: float
    method: str
    path: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered.

    Attributes:
        delay_s: goes before it.
        drop: close the connection instead.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False


class DemoServer:
    """Answers on a port of this machine while it is entered as a context manager.

    Attributes:
        url: its address.
        asked: all requests so far, in the order of their arrival.
        keys: the API keys that are known, a request with another one is refused; None knows all.
        fault: called for each request; a reply of its own takes the place of the right one.
    """

    def __init__(self, literature: Sequence[Record] | None = None, port: int = 0, rate: int | None = None) -> None:
        """Take a port; 0 is any that is free.

        Args:
            rate: requests in any second before the server answers 429; None for no limit.
        """
        self.literature = tuple(records() if literature is None else literature)
        self.asked: list[Asked] = []
        self.keys: tuple[str, ...] | None = None
        self.fault: Callable[[Asked], Reply | None] = lambda asked: None
        self._rate = rate
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
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

    def reply(self, method: str, path: str, parameters: Mapping[str, str]) -> Reply:
        """Return the answer to a request that has just arrived."""
        with self._lock:
            asked = Asked(time.monotonic(), method, path, parameters)
            self.asked.append(asked)
            fault = self.fault(asked)
            recent = [entry for entry in self.asked[-(self._rate or 0) - 1 :] if asked.moment - entry.moment < 1]
        if fault is not None:
            return fault
        if self._rate is not None and len(recent) > self._rate:
            return _json_reply(_too_many(len(recent), self._rate), 429)
        if path == "/api/v2/studies":
            return self._studies(parameters)
        key = parameters.get("api_key")
        if key is not None and self.keys is not None and key not in self.keys:
            return _json_reply({"error": "API key invalid", "api-key": key, "type": "client", "status": "unknown"}, 400)
        if path == "/entrez/eutils/esearch.fcgi":
            return self._esearch(parameters)
        if path == "/entrez/eutils/esummary.fcgi":
            return _json_reply(self._esummary(parameters.get("id", "").split(",")))
        return Reply(b"no such path", 404)

    def _esearch(self, parameters: Mapping[str, str]) -> Reply:
        as_json = parameters.get("retmode", "xml") == "json"
        start, count = int(parameters.get("retstart", "0")), int(parameters.get("retmax", "20"))
        term = parameters.get("term", "")
        error = ""
        if parameters.get("db") != "pubmed":
            error = f"Invalid db name specified: {parameters.get('db', '')}"
        elif not term.strip():
            error = "Empty term and query_key - nothing todo"
        elif start > _MAX_START:
            error = f"Search Backend failed: Exception:\n'retstart' cannot be larger than {_MAX_START}."
        if error:
            return _json_reply({"esearchresult": {"ERROR": error}}) if as_json else _xml_reply(_tag("ERROR", error))
        found = search(term, self.literature, _until(parameters))
        ids = [record.pmid for record in found[start : start + count]]
        return (_esearch_json if as_json else _esearch_xml)(len(found), start, ids, term)

    def _esummary(self, ids: Sequence[str]) -> Json:
        known = {record.pmid: record for record in self.literature}
        found = {id: _summary(id, known.get(id)) for id in ids}
        return {"header": {"type": "esummary", "version": "0.3"}, "result": {"uids": list(ids), **found}}

    def _studies(self, parameters: Mapping[str, str]) -> Reply:
        unknown = next((name for name in parameters if name not in _STUDY_PARAMETERS), "")
        if unknown:
            return Reply(f"`{unknown}` is unknown parameter".encode(), 400)
        try:
            found = search(parameters.get("query.term", ""), self.literature, strict=True)
        except QuerySyntaxError as error:
            return Reply(f"Error parsing query in Other terms: {error}".encode(), 400)
        size = min(int(parameters.get("pageSize", "10")), _MAX_PAGE)
        token = parameters.get("pageToken", "")
        start = int(token.removeprefix("from-")) if token else 0
        described = "BriefTitle" in parameters.get("fields", "")
        answer: dict[str, object] = {"studies": [_study(record, described) for record in found[start : start + size]]}
        if parameters.get("countTotal") == "true":
            answer["totalCount"] = len(found)
        if start + size < len(found):
            answer["nextPageToken"] = f"from-{start + size}"
        return _json_reply(answer)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _handler(server: DemoServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def do_GET(self) -> None:
            self._answer("")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode())

        def log_message(self, *_: object) -> None:
            """Keep quiet; addresses may hold keys."""

        def _answer(self, form: str) -> None:
            parts = urlsplit(self.path)
            pairs = parse_qsl(parts.query, keep_blank_values=True) + parse_qsl(form, keep_blank_values=True)
            reply = server.reply(self.command, parts.path, dict(pairs))
            time.sleep(reply.delay_s)
            if reply.drop:
                self.close_connection = True
                return
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
                self.wfile.flush()
            except OSError:  # the client went away
                self.close_connection = True

    return Handler


def _until(parameters: Mapping[str, str]) -> str:
    return parameters.get("maxdate", "") if parameters.get("datetype") == "pdat" else ""


def _json_reply(answer: Json, status: int = 200) -> Reply:
    return Reply(json.dumps(answer).encode(), status, {"Content-Type": "application/json"})


def _xml_reply(inner: str) -> Reply:
    head = '<?xml version="1.0" encoding="UTF-8" ?>\n<!DOCTYPE eSearchResult PUBLIC "-//NLM//DTD esearch 20060628//EN" '
    head += '"https://eutils.ncbi.nlm.nih.gov/eutils/dtd/20060628/esearch.dtd">\n'
    body = f"{head}<eSearchResult>{inner}</eSearchResult>\n"
    return Reply(body.encode(), headers={"Content-Type": "text/xml; charset=UTF-8"})


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _esearch_json(count: int, start: int, ids: Sequence[str], term: str) -> Reply:
    result: dict[str, object] = {
        "count": str(count),
        "retmax": str(len(ids)),
        "retstart": str(start),
        "idlist": list(ids),
        "translationset": [],
        "querytranslation": term,
    }
    if not count:
        result["errorlist"] = {"phrasesnotfound": [term], "fieldsnotfound": []}
        result["warninglist"] = {"phrasesignored": [], "outputmessages": ["No items found."]}
    return _json_reply({"header": {"type": "esearch", "version": "0.3"}, "esearchresult": result})


def _esearch_xml(count: int, start: int, ids: Sequence[str], term: str) -> Reply:
    inner = _tag("Count", str(count)) + _tag("RetMax", str(len(ids))) + _tag("RetStart", str(start))
    inner += f"<IdList>{''.join(_tag('Id', id) for id in ids)}</IdList><TranslationSet/>"
    if not count:
        inner += f"<ErrorList>{_tag('PhraseNotFound', term)}</ErrorList>"
        inner += f"<WarningList>{_tag('OutputMessage', 'No items found.')}</WarningList>"
    return _xml_reply(inner)


def _summary(id: str, record: Record | None) -> Json:
    if record is None:
        return {"uid": id, "error": "cannot get document summary"}
    return {"uid": id, "title": record.title, "pubdate": record.date[:4], "sortpubdate": f"{record.date} 00:00"}


def _study(record: Record, described: bool) -> Json:
    protocol: dict[str, Json] = {"identificationModule": {"nctId": record.nct}}
    if described:
        protocol["identificationModule"] = {"nctId": record.nct, "briefTitle": record.title}
        protocol["descriptionModule"] = {"briefSummary": record.summary}
    return {"protocolSection": protocol}


def _too_many(count: int, limit: int) -> Json:
    return {"error": "API rate limit exceeded", "api-key": "127.0.0.1", "count": str(count), "limit": str(limit)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve from the command line until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m verl.retrieval.engines.demo_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8123, help="port on this machine")
    parser.add_argument("--rate", type=int, default=10, help="requests in any second before it answers 429")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    with DemoServer(port=args.port, rate=args.rate) as server:
        logger.info("%d records at %s; stop with Ctrl-C", len(server.literature), server.url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("stopped after %d requests", len(server.asked))


if __name__ == "__main__":
    main()
