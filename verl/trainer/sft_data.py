"""Examples of supervised fine-tuning: read from files, and fitted to the length that a model takes.

A row of a `.json` array, a `.jsonl` or a `.parquet` is a conversation, `{"messages": [{"role", "content"}, ...]}`, or
tokens, `{"input_ids": [...], "loss_mask": [0, 1, ...]}`: what was sampled is learned as it was sampled and never
tokenised anew. Either may carry a `weight`, or a `prob` as in ExSearch's training files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from verl.errors import DataError
from verl.trainer.sft_chat import encode_chat

Row = Mapping[str, Any]
Weighting = Literal["given", "released_v1", "none"]
"""Where an example's weight comes from: `given` is the row's `weight` (1 where it has none), `released_v1` is
exp(-prob), where `prob` is a mean negative log-likelihood (ExSearch, branch v1), `none` is 1 for all."""
Overlong = Literal["drop", "cut"]
"""What becomes of an example that is too long: `cut` keeps what ends with the last turn that fits."""


@dataclass(frozen=True, slots=True)
class SftExample:
    """One sequence to learn from.

    Attributes:
        learned: for each token, whether it is learned; never the first, which nothing predicts.
        weight: what the example counts, 0 or more.
    """

    input_ids: tuple[int, ...]
    learned: tuple[bool, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.learned):
            raise ValueError(f"{len(self.input_ids)} tokens, but {len(self.learned)} marks; expected one for each")
        if self.learned and self.learned[0]:
            raise ValueError("the first token is marked as learned, but nothing predicts it; mark later ones only")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight={self.weight}; expected a finite number of 0 or more")


@dataclass(frozen=True, slots=True)
class Fitted:
    """Examples that a run trains on, and how many it does not, by reason.

    Attributes:
        dropped: `overlong`, `nothing_learned`: examples that are left out.
        cut: examples that lost their end.
    """

    examples: tuple[SftExample, ...]
    dropped: Mapping[str, int]
    cut: int


def read_examples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    weighting: Weighting = "given",
    max_samples: int | None = None,
) -> list[SftExample]:
    """Read the examples of a file, in its order.

    Args:
        max_samples: take the first so many rows.

    Raises:
        DataError: no such file, an unknown suffix, no rows, or a row that is malformed; names the row.
    """
    examples: list[SftExample] = []
    for number, row in enumerate(_rows(Path(path))):
        if max_samples is not None and number >= max_samples:
            break
        try:
            examples.append(example_of(row, tokenizer, weighting))
        except (DataError, ValueError) as cause:
            raise DataError(f"{path}, row {number}: {cause}") from cause
    if not examples:
        raise DataError(f"{path} holds no rows; expected at least one example")
    return examples


def example_of(row: Row, tokenizer: PreTrainedTokenizerBase, weighting: Weighting = "given") -> SftExample:
    """Return the example of one row.

    Raises:
        DataError: what the row lacks or has wrong.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{type(row).__name__}; expected an object with messages or input_ids")
    weight = _weight(row, weighting)
    if row.get("input_ids") is not None:
        return _token_example(row, len(tokenizer), weight)
    ids, learned = encode_chat(tokenizer, _messages(row))
    return SftExample(tuple(ids), tuple(learned), weight)


def fit(examples: Sequence[SftExample], max_length: int, overlong: Overlong = "drop") -> Fitted:
    """Drop or cut what is longer than `max_length` tokens, and drop what has nothing to learn."""
    kept: list[SftExample] = []
    dropped = {"overlong": 0, "nothing_learned": 0}
    cut = 0
    for example in examples:
        fits = len(example.input_ids) <= max_length
        if not fits and overlong == "drop":
            dropped["overlong"] += 1
            continue
        short = example if fits else cut_at_turn(example, max_length)
        if not any(short.learned):
            dropped["nothing_learned"] += 1
            continue
        cut += not fits
        kept.append(short)
    return Fitted(tuple(kept), dropped, cut)


def cut_at_turn(example: SftExample, max_length: int) -> SftExample:
    """Return what of `example` ends with its last learned run that lies within `max_length`; empty if none does."""
    learned = example.learned
    ends = (i for i in range(min(max_length, len(learned)), 0, -1) if learned[i - 1])
    end = next((i for i in ends if i == len(learned) or not learned[i]), 0)
    return replace(example, input_ids=example.input_ids[:end], learned=learned[:end])


def _weight(row: Row, weighting: Weighting) -> float:
    if weighting == "none":
        return 1.0
    weight, prob = row.get("weight"), row.get("prob")
    if weighting == "released_v1":
        if weight is not None or prob is None:
            raise DataError(
                "weighting=released_v1 needs a prob and no weight; use weighting=given for rows with weights"
            )
        if not _is_number(prob) or not prob >= 0:
            raise DataError(f"prob={prob!r}; expected a mean negative log-likelihood: a finite number of 0 or more")
        return math.exp(-prob)
    if prob is not None:
        raise DataError(
            "a prob, which weighting=given does not read; choose weighting=released_v1 (exp(-prob)) or none"
        )
    if weight is None:
        return 1.0
    if not _is_number(weight) or weight < 0:
        raise DataError(f"weight={weight!r}; expected a finite number of 0 or more")
    return float(weight)


def _token_example(row: Row, vocabulary: int, weight: float) -> SftExample:
    ids, mask = list(row["input_ids"]), row.get("loss_mask")
    if mask is None:
        raise DataError("input_ids without loss_mask; expected a 0 or 1 for each token")
    mask = list(mask)
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]:
        raise DataError(
            f"token {wrong[0]!r} is not in the vocabulary of {vocabulary}; the row was written with another tokenizer"
        )
    if odd := [mark for mark in mask if mark not in (0, 1)]:
        raise DataError(f"loss_mask holds {odd[0]!r}; expected 0 or 1")
    if not any(mask):
        raise DataError("loss_mask marks no token; there is nothing to learn")
    return SftExample(tuple(ids), tuple(map(bool, mask)), weight)


def _messages(row: Row) -> list[Row]:
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f"no messages (keys: {', '.join(map(str, row))}); expected messages, or input_ids and loss_mask"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} is {str(message)[:60]!r}; expected an object with role and content")
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"message {number} has content of type {type(message.get('content')).__name__}; expected text"
            )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _rows(path: Path) -> Iterator[Row]:
    reader = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind {path.suffix!r}; expected .json, .jsonl or .parquet")
    try:
        yield from reader(path)
    except FileNotFoundError as cause:
        raise DataError(f"{path} does not exist; give the file of training examples") from cause
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as cause:
        raise DataError(f"{path} cannot be read: {cause}") from cause


def _json(path: Path) -> Iterator[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a JSON {type(rows).__name__}; expected an array of rows, or .jsonl for lines")
    yield from rows


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as cause:
                raise DataError(f"{path}:{number}: {cause}; expected one JSON object per line") from cause


def _parquet(path: Path) -> Iterator[Row]:
    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
