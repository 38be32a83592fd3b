"""A model server on a free port that misbehaves on demand, below the politeness of web frameworks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Respond = Callable[[dict[str, Any]], "Reply"]


@dataclass(frozen=True)
class Reply:
    """What goes over the wire; `hang` never answers, `claim` overstates the body's length and hangs up."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang: bool = False
    claim: int | None = None


def chat(text: str | None, model: str = "tiny", finish: str = "stop", **message: Any) -> Reply:
    """Build a well-formed chat completion of OpenAI's protocol."""
    payload = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }
    return Reply(json.dumps(payload).encode())


def claude(*texts: str, model: str = "tiny", stop: str = "end_turn") -> Reply:
    """Build a well-formed reply of the Messages API with a text block for each text."""
    payload = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text} for text in texts],
        "stop_reason": stop,
        "usage": {"input_tokens": 11, "output_tokens": 3},
    }
    return Reply(json.dumps(payload).encode())


def as_json(payload: Any, **reply: Any) -> Reply:
    """Build a reply with any payload."""
    return Reply(json.dumps(payload).encode(), **reply)


class FakeServer:
    """Replies to requests from `script`, then with `default`; records what came and how much at once.

    Args:
        routes: replies for paths that end so, before script and default.
    """

    def __init__(
        self,
        *script: Reply,
        default: Respond | None = None,
        models: list[dict[str, Any]] | None = None,
        routes: Mapping[str, Respond] | None = None,
    ) -> None:
        self.script = list(script)
        self.default = default or (lambda request: chat("Paris"))
        self.models = [{"id": "tiny", "max_model_len": 8192}] if models is None else models
        self.routes = dict(routes or {})
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.model_lists = 0
        self.connections = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; on the same port again after a `stop`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut every connection, as a killed process would."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head[0].split(" ")[1]
        if path.partition("?")[0].endswith("/models"):
            self.model_lists += 1
            return await self._write(writer, as_json({"object": "list", "data": self.models}))
        self.headers.append(headers)
        self.paths.append(path)
        request = json.loads(body)
        self.requests.append(request)
        reply = self._reply(path, request)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return await self._write(writer, reply)
        finally:
            self._in_flight -= 1

    def _reply(self, path: str, request: dict[str, Any]) -> Reply:
        for suffix, respond in self.routes.items():
            if path.partition("?")[0].endswith(suffix):
                return respond(request)
        return self.script.pop(0) if self.script else self.default(request)

    async def _write(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        if reply.hang:
            await asyncio.Event().wait()
        if reply.delay:
            await asyncio.sleep(reply.delay)
        length = len(reply.body) if reply.claim is None else reply.claim
        headers = {"content-type": "application/json", "content-length": str(length), **reply.headers}
        head = f"HTTP/1.1 {reply.status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(head.encode("latin-1") + b"\r\n" + reply.body)
        await writer.drain()
        return reply.claim is None
