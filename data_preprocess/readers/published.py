"""The parquet files of s3 and Search-R1 (`nq_hotpotqa_train`), and those that this project writes.

`verl.records` says how their columns are read. Their questions keep their own source and id: they are complete.
"""

from __future__ import annotations

from data_preprocess.readers.base import Entry, Format, Row
from verl.errors import DataError
from verl.records import question_from_row


def recognises(row: Row) -> bool:
    """Whether the row names its data source."""
    return "data_source" in row


def read(row: Row) -> Entry:
    """Read one row."""
    try:
        question = question_from_row(row)
    except DataError as cause:
        raise ValueError(str(cause)) from cause
    return Entry(complete=question)


FORMAT = Format("published", "data_source and reward_model", recognises, read, adds_question_mark=False)
