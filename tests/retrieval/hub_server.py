"""A server that speaks as much of the Hugging Face hub's protocol as a download needs, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubFile:
    """A file of a repository.

    Attributes:
        served: what is sent in place of `content`, which the listing describes.
        lfs: whether git LFS keeps it, which decides about its checksum.
        cuts: for the next requests: after how many bytes the connection breaks.
        statuses: for the next requests: answer with this status.
        stall: wait for this event before the last byte.
        ranges: whether Range is understood.
        chunked: send no length, end the answer by closing the connection.
    """

    content: bytes
    served: bytes | None = None
    lfs: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    stall: threading.Event | None = None
    ranges: bool = True
    chunked: bool = False

    def entry(self, name: str) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()
        entry: dict[str, object] = {"rfilename": name, "size": len(self.content), "blobId": blob}
        if self.lfs:
            sha = hashlib.sha256(self.content).hexdigest()
            entry["lfs"] = {"sha256": sha, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class FakeHub:
    """Repositories by `datasets/owner/name` or `models/owner/name`, and what was asked for.

    Attributes:
        asked: (file, first byte asked for) of every request for a file.
        listing_statuses: for the next listings: answer with this status.
        raw_listing: answer listings with these bytes.
    """

    repos: dict[str, dict[str, HubFile]]
    url: str = ""
    asked: list[tuple[str, int]] = field(default_factory=list)
    listings: int = 0
    listing_statuses: list[int] = field(default_factory=list)
    raw_listing: bytes | None = None


@contextmanager
def serve(repos: dict[str, dict[str, HubFile]]) -> Iterator[FakeHub]:
    """Serve `repos` on a free port for the time of the context."""
    hub = FakeHub(repos)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/"):
            self._list(path.removeprefix("api/"))
        else:
            prefix = "" if path.startswith("datasets/") else "models/"
            repo, _, rest = f"{prefix}{path}".partition("/resolve/")
            revision, _, name = rest.partition("/")
            known = self.hub.repos.get(repo, {}) if revision == REVISION else {}
            self._send(name, known[name]) if name in known else self._refuse(404)

    def _list(self, repo: str) -> None:
        self.hub.listings += 1
        if self.hub.listing_statuses:
            return self._refuse(self.hub.listing_statuses.pop(0))
        if repo not in self.hub.repos:
            return self._refuse(404, "RepoNotFound")
        files = [file.entry(name) for name, file in self.hub.repos[repo].items()]
        listing = {"id": repo.partition("/")[2], "sha": REVISION, "siblings": files, "tags": [], "downloads": 0}
        body = self.hub.raw_listing if self.hub.raw_listing is not None else json.dumps(listing).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, name: str, file: HubFile) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.hub.asked.append((name, start))
        if file.statuses:
            return self._refuse(file.statuses.pop(0))
        content = file.content if file.served is None else file.served
        start = start if file.ranges else 0
        body = content[start:]
        self.send_response(206 if start else 200)
        if not file.chunked:
            self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut = file.cuts.pop(0) if file.cuts else len(body)
        if file.stall is not None:
            self.wfile.write(body[: max(cut - 1, 0)])
            self.wfile.flush()
            file.stall.wait(timeout=30)
            body, cut = body[max(cut - 1, 0) :], 1
        self.wfile.write(body[:cut])
        self.close_connection = True

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""
