"""A cheap load generator for the retriever benchmarks: raw keep-alive connections, one query in a request.

    python scripts/bench/retriever_load.py < job.json > outcome.json

A job is `{"port", "bodies": [request body], "requests", "clients"}`: so many clients each ask again as soon as they
were answered. With `"rate"` requests a second they are sent by a timetable instead, evenly or (`"poisson": true`) at
random, whether or not the ones before were answered, and a latency counts from the time in the timetable.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

_HEAD = b"POST /retrieve HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass
class Outcome:
    """What came of a job: the answers by request, and their latencies in seconds."""

    seconds: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)


class Connection(asyncio.Protocol):
    """Sends one request at a time and reads its answer."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = bytearray()
        self._length: int | None = None
        self._answered: Callable[[int, bytes], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._transport = transport

    def ask(self, request: bytes, answered: Callable[[int, bytes], None]) -> None:
        """Send a request; `answered` is called with the status and the body."""
        self._answered = answered
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Collect the answer."""
        self._received += data
        if self._length is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._received[:end]).lower()
            self._length = end + 4 + int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(self._received) >= self._length:
            status, body = int(self._received[9:12]), bytes(self._received).partition(b"\r\n\r\n")[2]
            self._received.clear()
            self._length = None
            assert self._answered is not None
            self._answered(status, body)


class Load:
    """One job."""

    def __init__(self, job: dict[str, Any]) -> None:
        bodies = [body.encode() for body in job["bodies"]]
        self._port = job["port"]
        self._requests = [_HEAD % len(body) + body for body in bodies]
        self._count = job["requests"]
        self._clients = job.get("clients", 1)
        self._rate = job.get("rate")
        self._poisson = job.get("poisson", False)
        self._outcome = Outcome()
        self._done = asyncio.Event()

    async def run(self) -> Outcome:
        """Send all requests, and wait for all answers."""
        connections = [await self._connect() for _ in range(self._clients)]
        start = time.perf_counter()
        if self._rate is None:
            numbers = iter(range(self._count))
            for connection in connections:
                self._again(connection, numbers)
        else:
            await self._by_timetable(deque(connections), start)
        await self._done.wait()
        self._outcome.seconds = time.perf_counter() - start
        return self._outcome

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        return connection

    def _again(self, connection: Connection, numbers: Any) -> None:
        number = next(numbers, None)
        if number is not None:
            self._ask(connection, number, time.perf_counter(), lambda: self._again(connection, numbers))

    async def _by_timetable(self, idle: deque[Connection], start: float) -> None:
        rng, due = random.Random(0), start
        for number in range(self._count):
            due += rng.expovariate(self._rate) if self._poisson else 1 / self._rate
            while (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left if left > 0.002 else 0)
            connection = idle.popleft() if idle else await self._connect()
            self._ask(connection, number, due, lambda connection=connection: idle.append(connection))

    def _ask(self, connection: Connection, number: int, since: float, then: Callable[[], None]) -> None:
        def answered(status: int, body: bytes) -> None:
            outcome = self._outcome
            outcome.latencies.append(time.perf_counter() - since)
            outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
            outcome.answers[number % len(self._requests)] = body.decode()
            if len(outcome.latencies) == self._count:
                self._done.set()
            then()

        connection.ask(self._requests[number % len(self._requests)], answered)


async def main() -> None:
    """Run the job on stdin and print what came of it."""
    outcome = await Load(json.load(sys.stdin)).run()
    json.dump(vars(outcome), sys.stdout)


if __name__ == "__main__":
    uvloop.run(main())
