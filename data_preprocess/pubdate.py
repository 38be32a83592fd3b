"""Publication dates of reviews: to one form, and from PubMed where a row has none.

    python -m data_preprocess.pubdate --source raw.jsonl --save_to dated.jsonl

A review's date limits what its questions may find, so it is never made later than it may be: a month or day that is
not given is the first one, as where PubMed sorts by date.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from data_preprocess.readers.files import read_file
from verl.errors import DataError, SearchAgentError
from verl.evaluation.journal import write_whole
from verl.retrieval.engines.literature import LiteratureConfig, open_pubmed

logger = logging.getLogger(__name__)

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NUMBERS = re.compile(r"(\d{4})(?:[/-](\d{1,2})(?:[/-](\d{1,2}))?)?(?:[ T]\d\d:.*)?")
_WORDS = re.compile(r"(\d{4})(?:\s+([A-Za-z]{3})[a-z]*(?:\s*[-/].*|\s+(\d{1,2})\b.*)?)?")


def normalise_date(text: str) -> str:
    """Return a date as `YYYY/MM/DD`.

    Args:
        text: `2015/03/01`, `2015-03-01`, `2015 Mar 1`, `2015 Mar-Apr`, `2015 Spring`, `2015`.

    Raises:
        ValueError: it is none of these.
    """
    stripped = text.strip()
    if numbers := _NUMBERS.fullmatch(stripped):
        year, month, day = (int(part or 1) for part in numbers.groups())
    elif words := _WORDS.fullmatch(stripped):
        name = (words[2] or "").lower()
        month = _MONTHS.index(name) + 1 if name in _MONTHS else 1  # a season has no month
        year, day = int(words[1]), int(words[3] or 1)
    else:
        raise ValueError(f"pub_date is {text[:40]!r}; expected a date such as 2015/03/01, 2015 Mar 1 or 2015")
    try:
        return date(year, month, day).strftime("%Y/%m/%d")
    except ValueError as cause:
        raise ValueError(f"pub_date is {text[:40]!r}, which is no day of the calendar ({cause})") from cause


async def dates_of(pmids: Sequence[str], config: LiteratureConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the publication dates of those records that PubMed knows, `YYYY/MM/DD`.

    Raises:
        RetrieverError: PubMed gave no whole answer within the attempts.
    """
    pubmed = open_pubmed(config, environ)
    try:
        summaries = await pubmed.summaries(list(dict.fromkeys(pmids)))
    finally:
        await pubmed.aclose()
    return {id: normalise_date(summary.date) for id, summary in summaries.items() if summary.date}


def add_dates(
    source: Path, save_to: Path, config: LiteratureConfig, environ: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Write the rows of a raw file with the dates of their reviews (`origin.pmid`) where they have none.

    Returns:
        how many dates were added, and how many rows are still without one.

    Raises:
        DataError: a row cannot be read, or `save_to` exists.
        RetrieverError: PubMed gave no whole answer; nothing is written.
    """
    if save_to.exists():
        raise DataError(f"{save_to} exists; name a new file")
    rows: list[dict[str, Any]] = []
    for located in read_file(source):
        if located.row is None:
            raise DataError(f"{located.place}: {located.reason}")
        rows.append(dict(located.row))
    wanted = [(row, _review(row)) for row in rows if not str(row.get("pub_date") or "").strip()]
    pmids = [pmid for _, pmid in wanted if pmid]
    dates = asyncio.run(dates_of(pmids, config, environ)) if pmids else {}
    for row, pmid in wanted:
        if pmid in dates:
            row["pub_date"] = dates[pmid]
    write_whole(save_to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    added = sum(pmid in dates for _, pmid in wanted)
    return added, len(wanted) - added


def _review(row: Mapping[str, Any]) -> str:
    origin = row.get("origin")
    pmid = str(origin.get("pmid") or "").strip() if isinstance(origin, Mapping) else ""
    return pmid if pmid.isascii() and pmid.isdigit() else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Add dates from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.pubdate", description="Publication dates from PubMed for rows without one."
    )
    parser.add_argument("--source", required=True, help="raw jsonl with origin.pmid")
    parser.add_argument("--save_to", required=True, help="jsonl to write")
    parser.add_argument("--base_url", help="another host that speaks E-utilities")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        added, left = add_dates(Path(args.source), Path(args.save_to), LiteratureConfig(base_url=args.base_url))
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")
    logger.info("wrote %s: %d dates added, %d rows without one", args.save_to, added, left)


if __name__ == "__main__":
    main()
