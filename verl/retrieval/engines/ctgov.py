"""ClinicalTrials.gov through its API v2: the NCT ids of a query.

`GET /api/v2/studies?query.term=...` in pages of up to 1,000, each but the last with a `nextPageToken`. There is no key
and no published rate; the limit kept here is E-utilities' without a key, and third parties report about 50 requests a
minute, so lower the rate where it answers 429. No date limits a search, as published for DeepRetrieval.

A term that the service cannot parse (square brackets as in PubMed's field tags, unbalanced parentheses) is answered
with status 400. That is the query's fault and no failure: it finds nothing, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from verl.errors import RetrieverError
from verl.retrieval.engines.found import Found
from verl.retrieval.engines.service import Rejected, Request, Service, Unusable, json_object
from verl.retrieval.web_http import shortened
from verl.types import Document

BASE_URL = "https://clinicaltrials.gov"
RATE = 3.0
MAX_TOPK = 10_000
_PATH = "/api/v2/studies"
_MAX_ADDRESS = 16_000
_ID = "NCTId"
_DESCRIBED = "NCTId,BriefTitle,BriefSummary"


@dataclass(frozen=True, slots=True)
class Page:
    """One page of studies.

    Attributes:
        total: studies of the whole search; None where it was not asked for.
        next: token of the next page, empty on the last one.
    """

    documents: tuple[Document, ...]
    total: int | None
    next: str


class ClinicalTrials:
    """ClinicalTrials.gov as a `Source`."""

    def __init__(self, service: Service, page_size: int, with_titles: bool) -> None:
        """Use `literature.open_literature`.

        Args:
            page_size: studies per request, at most 1,000.
        """
        self._service = service
        self._page_size = page_size
        self._fields = _DESCRIBED if with_titles else _ID

    async def find(self, term: str, topk: int, until: str) -> Found:
        """Search; see `Source.find`."""
        size = min(self._page_size, topk)
        documents: dict[str, Document] = {}
        total, start, token = None, 0, ""
        while total is None or start < min(total, topk):
            try:
                page = await self._service.ask(
                    self._request(term, size, token), partial(_read, size=size, start=start, total=total, topk=topk)
                )
            except Rejected as cause:
                if not _blames_the_term(cause):
                    raise
                return Found(refused=cause.reason)
            for document in page.documents:
                documents.setdefault(document.id, document)
            total, start, token = total if page.total is None else page.total, start + size, page.next
        return Found(tuple(documents.values())[:topk])

    async def aclose(self) -> None:
        """Close the connections."""
        await self._service.aclose()

    def _request(self, term: str, size: int, token: str) -> Request:
        parameters = {"query.term": term, "pageSize": str(size), "fields": self._fields}
        parameters |= {"pageToken": token} if token else {"countTotal": "true"}
        length = len(urlencode(parameters))
        if length > _MAX_ADDRESS:
            raise RetrieverError(
                f"the query of {len(term)} characters makes an address of {length}; ClinicalTrials.gov takes no form, "
                f"expected at most {_MAX_ADDRESS}, so shorten it"
            )
        return Request(_PATH, parameters)


def read_page(text: str) -> Page:
    """Read an answer.

    Raises:
        Unusable: it is none.
    """
    answer = json_object(text)
    studies = answer.get("studies")
    if not isinstance(studies, list):
        raise Unusable(f"the answer has no list of studies: {shortened(text[:80])}")
    total, token = answer.get("totalCount"), answer.get("nextPageToken", "")
    if not (total is None or (type(total) is int and total >= 0)) or not isinstance(token, str):
        raise Unusable("totalCount is no number or nextPageToken no text")
    return Page(tuple(_documents(studies)), total, token)


def _read(text: str, size: int, start: int, total: int | None, topk: int) -> Page:
    """Read a page and see that it is whole."""
    page = read_page(text)
    total = page.total if total is None else total
    if total is None:
        raise Unusable("the first page has no totalCount")
    expected = min(size, total - start)
    if len(page.documents) != expected:
        raise Unusable(f"the page from {start} has {len(page.documents)} of its {expected} studies")
    if not page.next and start + expected < min(total, topk):
        raise Unusable(f"{start + expected} of {total} studies are read, and there is no nextPageToken")
    return page


def _documents(studies: Sequence[object]) -> Iterator[Document]:
    for study in studies:
        protocol = _part(study, "protocolSection")
        named = _part(protocol, "identificationModule")
        id = named.get("nctId")
        if not (isinstance(id, str) and id.strip()):
            raise Unusable("a study has no nctId")
        summary = _part(protocol, "descriptionModule").get("briefSummary")
        yield Document(id.strip(), _line(named.get("briefTitle")), _line(summary))


def _part(whole: object, name: str) -> Mapping[str, object]:
    part = whole.get(name) if isinstance(whole, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _line(value: object) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _blames_the_term(cause: Rejected) -> bool:
    """Whether a 400 is about the term, and not about the rest of the request, which is ours."""
    return cause.status == 400 and "parsing query" in cause.reason.lower()
