"""The way to a service: rate, retries, waits, and that no key shows anywhere."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import ModuleType

import pytest

from tests.retrieval.engines.literature_server import KEY, RATE_EXCEEDED, LiteratureServer
from verl.errors import ConfigError, RetrieverError
from verl.retrieval.engines.demo_server import Reply
from verl.retrieval.engines.service import Rejected, Request, Service, ServiceConfig, Unusable
from verl.retrieval.web_formats import Credential
from verl.retrieval.web_http import Secrets
from verl.services import free_port

CREDENTIAL = Credential("NCBI_API_KEY", "query", "api_key")
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "literature.py"
SEARCH = Request("/entrez/eutils/esearch.fcgi", {"db": "pubmed", "term": "asthma", "retmode": "json"})
QUICK = ServiceConfig(rate=1000, backoff_s=0.001, max_wait_s=1, timeout_s=5)
BROKEN = Reply(b"oops", 500)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("literature_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "literature_bench", module)
    spec.loader.exec_module(module)
    return module


def service(url: str, config: ServiceConfig = QUICK, keyed: bool = True, rate: float = 3.0) -> Service:
    secrets = Secrets((CREDENTIAL,) if keyed else (), {"NCBI_API_KEY": KEY})
    return Service(url, rate, secrets, config)


async def test_parameters_arrive_as_they_are_in_address_and_form(server: LiteratureServer) -> None:
    term = 'a & b # c ? d=e + "f" %41 \\ / 哮喘 é \U0001f600'
    for form in (False, True):
        asked = Request(SEARCH.path, {**SEARCH.parameters, "term": term}, form)
        await service(server.url).ask(asked, str)
        assert server.asked[-1].parameters == {**asked.parameters, "api_key": KEY}
    assert [entry.method for entry in server.asked] == ["GET", "POST"]


async def test_without_a_key_none_is_sent(server: LiteratureServer) -> None:
    await service(server.url, keyed=False).ask(SEARCH, str)
    assert server.asked[0].parameters == SEARCH.parameters


@pytest.mark.parametrize(
    "fault",
    [
        Reply(RATE_EXCEEDED, 429),
        Reply(b"", 429, {"Retry-After": "0"}),
        Reply(b"", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(b"", 429, {"Retry-After": "soon"}),
        BROKEN,
        Reply(b"gateway", 502),
        Reply(b"busy", 503),
        Reply(drop=True),
        Reply(b"late", delay_s=1.0),
        Reply(b"\xff\xfe"),
        Reply(b"short", headers={"Content-Length": "100"}),
    ],
)
async def test_a_fault_is_asked_again(server: LiteratureServer, fault: Reply) -> None:
    server.faults.extend([fault, fault])
    asking = service(server.url, ServiceConfig(rate=1000, backoff_s=0.001, timeout_s=0.3))
    assert "idlist" in await asking.ask(SEARCH, str)
    assert (asking.requests, asking.retries, len(server.asked)) == (3, 2, 3)


async def test_an_answer_that_cannot_be_used_is_asked_again(server: LiteratureServer) -> None:
    seen: list[str] = []

    def read(text: str) -> int:
        seen.append(text)
        if len(seen) < 3:
            raise Unusable("half of it")
        return len(seen)

    assert await service(server.url).ask(SEARCH, read) == 3


async def test_attempts_are_bounded(server: LiteratureServer) -> None:
    server.always = BROKEN
    with pytest.raises(RetrieverError, match=r"status 500: oops \(5 attempts\)"):
        await service(server.url).ask(SEARCH, str)
    assert len(server.asked) == 5


async def test_nobody_at_home() -> None:
    with pytest.raises(RetrieverError, match=r"ConnectError.*\(2 attempts\)"):
        await service(f"http://127.0.0.1:{free_port()}", ServiceConfig(attempts=2, backoff_s=0)).ask(SEARCH, str)


async def test_an_answer_that_drips_is_a_fault() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.02)
        except OSError:
            writer.close()

    listener = await asyncio.start_server(drip, "127.0.0.1", 0, family=socket.AF_INET)
    port = listener.sockets[0].getsockname()[1]
    asking = service(f"http://127.0.0.1:{port}", ServiceConfig(attempts=1, timeout_s=0.2))
    with pytest.raises(RetrieverError, match=r"no answer within 0\.2 s"):
        await asking.ask(SEARCH, str)
    await asking.aclose()
    listener.close()


async def test_a_refusal_is_final_and_says_why(server: LiteratureServer) -> None:
    server.keys = ()
    with pytest.raises(Rejected, match=r"status 400: .*API key invalid.*; check NCBI_API_KEY") as caught:
        await service(server.url).ask(SEARCH, str)
    assert caught.value.status == 400 and len(server.asked) == 1
    with pytest.raises(Rejected, match=r"status 404: no such path$"):
        await service(server.url, keyed=False).ask(Request("/elsewhere", {}), str)
    server.always = Reply(b"", 403)
    with pytest.raises(Rejected, match="no reason given; check whether the service admits you"):
        await service(server.url, keyed=False).ask(SEARCH, str)


async def test_an_answer_that_never_ends_is_refused(server: LiteratureServer) -> None:
    server.always = Reply(b"x" * 5000)
    with pytest.raises(RetrieverError, match="more than max_body_bytes=1000"):
        await service(server.url, ServiceConfig(max_body_bytes=1000)).ask(SEARCH, str)
    assert len(server.asked) == 1


async def test_no_key_in_logs_or_errors(server: LiteratureServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults.extend([Reply(RATE_EXCEEDED, 429), Reply(KEY.encode()), Reply(RATE_EXCEEDED, 400)])

    def read(text: str) -> str:
        raise Unusable(f"{text} and {KEY}")

    for form in (False, True):
        asking = service(server.url, ServiceConfig(rate=1000, attempts=2, backoff_s=0))
        with pytest.raises(RetrieverError) as caught:
            await asking.ask(Request(SEARCH.path, SEARCH.parameters, form), read)
        assert KEY not in str(caught.value) and KEY not in repr(asking.__dict__)
    assert server.asked[-1].parameters["api_key"] == KEY
    assert caplog.text and KEY not in caplog.text and "[key]" in caplog.text


async def test_one_that_asks_to_wait_is_waited_for(server: LiteratureServer) -> None:
    slept: list[float] = []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds
        await asyncio.sleep(0)

    server.faults.append(Reply(b"", 429, {"Retry-After": "7"}))
    asking = Service(server.url, 3.0, Secrets((), {}), ServiceConfig(travel_s=0, backoff_s=0), lambda: now, sleep)
    await asking.ask(SEARCH, str)
    assert now >= 7.0 and len(server.asked) == 2


@pytest.mark.parametrize("as_date", [False, True])
async def test_one_that_asks_for_too_long_a_wait_is_left_alone(server: LiteratureServer, as_date: bool) -> None:
    after = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True) if as_date else "3600"
    server.faults.append(Reply(b"", 503, {"Retry-After": after}))
    asking = service(server.url)
    with pytest.raises(RetrieverError, match=r"status 503: no reason given \(1 attempts\)"):
        await asking.ask(SEARCH, str)
    with pytest.raises(RetrieverError, match=r"left alone for 3[56]\d\d s more"):
        await asking.ask(SEARCH, str)
    assert len(server.asked) == 1


@pytest.mark.parametrize(("sharers", "wanted"), [(1, 20), (4, 5)])
async def test_the_rate_is_kept_where_the_service_sees_it(
    server: LiteratureServer, bench: ModuleType, sharers: int, wanted: int
) -> None:
    # The clock runs four times as fast as the real one, so 3 of its seconds are enough.
    clock, sleep = bench.scaled(4)
    config = ServiceConfig(rate=20, sharers=sharers, travel_s=2, concurrency=50)
    asking = Service(server.url, 3.0, Secrets((), {}), config, clock, sleep)
    await asyncio.gather(*(asking.ask(SEARCH, str) for _ in range(3 * wanted + 1)))
    moments = sorted(entry.moment * 4 for entry in server.asked)
    assert len(moments) == 3 * wanted + 1
    assert all(later - earlier >= 1 for earlier, later in zip(moments, moments[wanted:], strict=False))


async def test_a_request_without_an_answer_is_counted_when_it_must_have_arrived(server: LiteratureServer) -> None:
    server.always = Reply(b"{}", delay_s=8)
    asking = service(server.url, ServiceConfig(rate=10, sharers=4, travel_s=0.1))
    tasks = [asyncio.create_task(asking.ask(SEARCH, str)) for _ in range(2)]
    # Counted at its answer, the first would keep the second back for more than 8 s.
    async with asyncio.timeout(6):
        while len(server.asked) < 2:
            await asyncio.sleep(0.02)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_bench_counts_what_it_should(bench: ModuleType) -> None:
    assert [bench.busiest(moments) for moments in ([], [5.0], [0, 0.5, 1.0, 1.2], [0.9, 0.1, 0.0, 1.0])] == [0, 1, 3, 3]
    found = await bench.measure(queries=60, share=0.1, speed=20, seed=3, travel_s=2.0)
    assert found.passed and found.faults > 0 and found.requests >= 60 + found.faults and found.seconds >= 5


def test_a_search_belongs_to_one_loop(server: LiteratureServer) -> None:
    asking = service(server.url)
    asyncio.run(asking.ask(SEARCH, str))
    with pytest.raises(RetrieverError, match="another event loop"):
        asyncio.run(asking.ask(SEARCH, str))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate=0.0; expected a positive"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"attempts": 0}, "attempts=0; expected at least 1"),
        ({"sharers": 0}, "sharers=0"),
        ({"travel_s": -1.0}, "travel_s=-1.0; expected 0 or more"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceConfig(**values)


def test_keys_go_to_no_plain_address() -> None:
    with pytest.raises(ConfigError, match="expected https"):
        service("http://eutils.example.org")


def test_a_proxy_that_is_none_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "gopher://nowhere:1")
    with pytest.raises(ConfigError, match="proxy"):
        service("https://eutils.example.org")
