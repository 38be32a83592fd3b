"""What a literature service finds for a query, and what such a service is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from verl.types import Document


@dataclass(frozen=True, slots=True)
class Found:
    """All of an answer, or of its first `topk` records.

    Attributes:
        documents: in the service's order, every id once.
        refused: why the service takes the query for none, in its words; it then finds nothing.
    """

    documents: tuple[Document, ...] = ()
    refused: str = ""


class Source(Protocol):
    """One service."""

    async def find(self, term: str, topk: int, until: str) -> Found:
        """Search.

        Args:
            term: not blank, without control characters.
            until: date up to which publications count, empty for no limit.

        Raises:
            RetrieverError: no whole answer within the attempts; never a part of one instead.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...
