"""All formats by name, and which of them a row belongs to.

To add one: write a module with a `Format`, and enter it below, before the formats that would recognise its rows too.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_preprocess.readers import (
    flashrag,
    mirage,
    multihop,
    musique,
    nq_open,
    passages,
    published,
    pubmedqa,
    squad,
    strategyqa,
)
from data_preprocess.readers.base import Format, Row

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        published.FORMAT,
        flashrag.FORMAT,
        mirage.FORMAT,
        multihop.TWO_WIKI,
        multihop.HOTPOTQA,
        musique.FORMAT,
        squad.FORMAT,
        pubmedqa.FORMAT,
        strategyqa.FORMAT,
        nq_open.FORMAT,
        passages.FORMAT,
    )
}
AUTO = "auto"


def recognise(rows: Sequence[Row]) -> Format | None:
    """Return the format of the first of `rows` that has one; None if none has."""
    for row in rows:
        for format in FORMATS.values():
            if format.recognises(row) or format.nested(row):
                return format
    return None
