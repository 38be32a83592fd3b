"""Publication dates: one form for all, and PubMed's where a row has none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess import pubdate
from data_preprocess.pubdate import add_dates, normalise_date
from tests.retrieval.engines.literature_server import LiteratureServer
from verl.errors import DataError, RetrieverError
from verl.retrieval.engines.demo_records import records
from verl.retrieval.engines.demo_server import Reply
from verl.retrieval.engines.literature import LiteratureConfig
from verl.retrieval.engines.service import ServiceConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2015/03/01", "2015/03/01"),
        ("2015/3/1", "2015/03/01"),
        ("2015-03-01", "2015/03/01"),
        ("2015-03-01T12:00:00Z", "2015/03/01"),
        ("2015/03/01 00:00", "2015/03/01"),
        ("2015/03", "2015/03/01"),
        (" 2015 ", "2015/01/01"),
        ("2015 Mar", "2015/03/01"),
        ("2015 March 9", "2015/03/09"),
        ("2015 Dec 31", "2015/12/31"),
        ("2015 Mar-Apr", "2015/03/01"),
        ("2015 Dec-2016 Jan", "2015/12/01"),
        ("2015 Spring", "2015/01/01"),
    ],
)
def test_dates(text: str, expected: str) -> None:
    assert normalise_date(text) == expected


@pytest.mark.parametrize(
    "text", ["", "soon", "03/01/2015", "2015/13/01", "2015 Feb 30", "15", "20150301", "2015/03/01x"]
)
def test_what_is_no_date(text: str) -> None:
    with pytest.raises(ValueError, match="pub_date is"):
        normalise_date(text)


@given(st.dates(min_value=date(1000, 1, 1)))
def test_every_day(day: date) -> None:
    assert normalise_date(day.isoformat()) == normalise_date(day.strftime("%Y %b %d")) == day.strftime("%Y/%m/%d")


@pytest.fixture
def server() -> Iterator[LiteratureServer]:
    with LiteratureServer() as running:
        yield running


def test_dates_come_from_pubmed(server: LiteratureServer, tmp_path: Path) -> None:
    first, second = records()[:2]
    rows = [
        {"n": 1, "origin": {"pmid": int(first.pmid)}},
        {"n": 2, "origin": {"pmid": second.pmid}, "pub_date": ""},
        {"n": 3, "origin": {"pmid": first.pmid}, "pub_date": "1999/01/01"},
        {"n": 4, "origin": {"pmid": "1"}},
        {"n": 5, "origin": {"pmid": "1; DROP"}},
        {"n": 6},
    ]
    source = tmp_path / "raw.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LiteratureConfig(base_url=server.url, http=ServiceConfig(rate=1000, attempts=2, backoff_s=0))
    server.always = Reply(b"", 500)
    with pytest.raises(RetrieverError, match="status 500"):
        add_dates(source, tmp_path / "dated.jsonl", config, {})
    assert not (tmp_path / "dated.jsonl").exists()
    server.always = None
    assert add_dates(source, tmp_path / "dated.jsonl", config, {}) == (2, 3)
    dated = [json.loads(line) for line in (tmp_path / "dated.jsonl").read_text().splitlines()]
    assert [row.get("pub_date") for row in dated] == [first.date, second.date, "1999/01/01", None, None, None]
    assert [row["n"] for row in dated] == [1, 2, 3, 4, 5, 6]
    assert server.asked[-1].parameters["id"] == f"{first.pmid},{second.pmid},1"
    with pytest.raises(DataError, match="exists; name a new file"):
        add_dates(source, tmp_path / "dated.jsonl", config, {})


def test_from_the_command_line(
    server: LiteratureServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("NCBI_API_KEY", raising=False)
    source = tmp_path / "raw.jsonl"
    source.write_text(json.dumps({"origin": {"pmid": records()[0].pmid}}) + "\n")
    command = ["--source", str(source), "--save_to", str(tmp_path / "dated.jsonl"), "--base_url", server.url]
    pubdate.main(command)
    assert "1 dates added, 0 rows without one" in caplog.text
    with pytest.raises(SystemExit, match="1"):
        pubdate.main(command)
