"""PubMed through NCBI's E-utilities: esearch for the ids of a query, esummary for titles and dates.

Formats: E-utilities Help, NBK25499. esearch answers in JSON or XML, with status 200 also where it reports an error
(`ERROR`). Phrases that are not found, or are ignored, stand in lists of their own and are no errors. A search reaches
its first 9,999 records. The key (`NCBI_API_KEY`) is optional; it raises the rate from 3 requests a second to 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal
from urllib.parse import urlencode
from xml.etree import ElementTree

from verl.retrieval.engines.found import Found
from verl.retrieval.engines.service import Request, Service, Unusable, json_object
from verl.retrieval.web_formats import Credential
from verl.retrieval.web_http import shortened
from verl.types import Document

BASE_URL = "https://eutils.ncbi.nlm.nih.gov"
KEY = Credential("NCBI_API_KEY", "query", "api_key")
RATE = 3.0
RATE_WITH_KEY = 10.0
MAX_TOPK = 9_999
_MIN_DATE = "1970/01/01"
_SUMMARIES = 200
# Longer ones are sent as a form; the service answers 414 to addresses of some 3,000 characters.
_MAX_ADDRESS = 1_500

RetMode = Literal["json", "xml"]


@dataclass(frozen=True, slots=True)
class Page:
    """The ids of one page, and how many records the whole search has."""

    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What esummary says of a record; all empty where it cannot say anything.

    Attributes:
        date: of publication, `YYYY/MM/DD`; what PubMed sorts by, so a missing month or day is 01.
    """

    title: str
    date: str


class PubMed:
    """PubMed as a `Source`."""

    def __init__(
        self, service: Service, page_size: int, retmode: RetMode, with_titles: bool, extra: Mapping[str, str]
    ) -> None:
        """Use `literature.open_literature`.

        Args:
            page_size: ids per request, at most 10,000.
            extra: further parameters of every request (`tool`, `email`).
        """
        self._service = service
        self._page_size = page_size
        self._retmode = retmode
        self._with_titles = with_titles
        self._extra = dict(extra)

    async def find(self, term: str, topk: int, until: str) -> Found:
        """Search; see `Source.find`."""
        ids: dict[str, None] = {}
        total: int | None = None
        start = 0
        while total is None or start < min(total, topk):
            wanted = min(self._page_size, topk - start)
            page = await self._service.ask(
                self._esearch(term, start, wanted, until), partial(self._read, start=start, wanted=wanted, total=total)
            )
            ids.update(dict.fromkeys(page.ids))
            total, start = page.count, start + wanted
        summaries = await self.summaries(list(ids)) if self._with_titles else {}
        titles = {id: summary.title for id, summary in summaries.items()}
        return Found(tuple(Document(id, titles.get(id, ""), "") for id in ids))

    async def summaries(self, ids: Sequence[str]) -> dict[str, Summary]:
        """Return what esummary says of each id.

        Raises:
            RetrieverError: no whole answer within the attempts.
        """
        found: dict[str, Summary] = {}
        for start in range(0, len(ids), _SUMMARIES):
            batch = ids[start : start + _SUMMARIES]
            found |= await self._service.ask(self._esummary(batch), partial(read_summaries, batch))
        return found

    async def aclose(self) -> None:
        """Close the connections."""
        await self._service.aclose()

    def _esearch(self, term: str, start: int, count: int, until: str) -> Request:
        parameters = {
            "db": "pubmed",
            "term": term,
            "retmode": self._retmode,
            "retstart": str(start),
            "retmax": str(count),
            **date_limit(until),
        }
        return self._request("esearch", parameters)

    def _esummary(self, ids: Sequence[str]) -> Request:
        return self._request("esummary", {"db": "pubmed", "id": ",".join(ids), "retmode": "json"})

    def _request(self, utility: str, parameters: Mapping[str, str]) -> Request:
        parameters = {**parameters, **self._extra}
        return Request(f"/entrez/eutils/{utility}.fcgi", parameters, form=len(urlencode(parameters)) > _MAX_ADDRESS)

    def _read(self, text: str, start: int, wanted: int, total: int | None) -> Page:
        """Read a page and see that it is whole."""
        page = read_json(text) if self._retmode == "json" else read_xml(text)
        if total is not None and page.count != total:
            raise Unusable(f"the search has {page.count} records and had {total} a page ago")
        expected = max(0, min(wanted, min(page.count, MAX_TOPK) - start))
        if len(page.ids) != expected:
            raise Unusable(f"the page from {start} has {len(page.ids)} of its {expected} ids")
        return page


def date_limit(until: str) -> dict[str, str]:
    """Return the parameters that leave out what was published later; none without a date."""
    return {"datetype": "pdat", "mindate": _MIN_DATE, "maxdate": until} if until else {}


def read_json(text: str) -> Page:
    """Read an answer of esearch.

    Raises:
        Unusable: it is none, or reports an error.
    """
    answer = json_object(text)
    result = answer.get("esearchresult")
    if not isinstance(result, dict):
        raise Unusable(f"the answer is none of esearch: {_reason(answer) or shortened(text[:80])}")
    if "ERROR" in result:
        return _page_of_error(str(result["ERROR"]))
    count, ids = result.get("count"), result.get("idlist")
    if not isinstance(ids, list):
        raise Unusable("the answer has no idlist")
    return Page(_number(count), tuple(_id(id) for id in ids))


def read_xml(text: str) -> Page:
    """Read the same in XML."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        start = shortened(text[:80]) or "nothing"
        raise Unusable(f"the answer is not XML ({shortened(str(error))}); it starts with: {start}") from None
    reported = root.find("ERROR")
    if reported is not None:
        return _page_of_error(reported.text or "")
    if root.tag != "eSearchResult" or root.find("IdList") is None:
        raise Unusable(f"the answer is a {shortened(root.tag)} without IdList, expected eSearchResult")
    return Page(_number(root.findtext("Count")), tuple(_id(id.text) for id in root.iterfind("IdList/Id")))


def read_summaries(ids: Sequence[str], text: str) -> dict[str, Summary]:
    """Read an answer of esummary about `ids`.

    Raises:
        Unusable: it is none, reports an error, or says nothing about one of the ids.
    """
    answer = json_object(text)
    result = answer.get("result")
    if not isinstance(result, dict):
        raise Unusable(f"the answer is none of esummary: {_reason(answer) or shortened(text[:80])}")
    missing = [id for id in ids if not isinstance(result.get(id), dict)]
    if missing:
        raise Unusable(f"esummary says nothing about {len(missing)} of {len(ids)} records, the first is {missing[0]}")
    return {id: _summary(result[id]) for id in ids}


def _summary(item: Mapping[str, object]) -> Summary:
    title, date = item.get("title"), item.get("sortpubdate")
    return Summary(
        " ".join(title.split()) if isinstance(title, str) else "",
        date.partition(" ")[0] if isinstance(date, str) else "",
    )


def _page_of_error(error: str) -> Page:
    """Return the empty page where only the term is at fault: it holds nothing that could be searched for."""
    if "empty term" in error.lower():
        return Page(0, ())
    raise Unusable(f"error: {shortened(error) or 'no reason given'}")


def _reason(answer: Mapping[str, object]) -> str:
    reason = answer.get("error", answer.get("ERROR", ""))
    return shortened(reason) if isinstance(reason, str) else ""


def _number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not (isinstance(value, str) and value.isascii() and value.isdigit()):
        raise Unusable(f"count={str(value)[:40]!a}; expected a number")
    return int(value[:18])


def _id(value: object) -> str:
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdigit()):
        raise Unusable(f"the id {str(value)[:40]!a} is no PMID")
    return text
