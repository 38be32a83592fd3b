"""Rows become examples, malformed ones are named, long ones are dropped or cut and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.tiny import tiny_tokenizer
from verl.errors import DataError
from verl.trainer.sft_batch import collate, rows_of, step_examples
from verl.trainer.sft_data import SftExample, cut_at_turn, example_of, fit, read_examples

TOKENIZER = tiny_tokenizer()
CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bob"}]}
TOKENS = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = sorted({name for row in rows for name in row})
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_format_holds_both_kinds_of_rows(tmp_path: Path, kind: str) -> None:
    rows = [{**CHAT, "weight": 0.25}, TOKENS]
    chat, tokens = read_examples(write(tmp_path / f"train.{kind}", rows), TOKENIZER)
    assert chat.weight == 0.25
    assert (
        TOKENIZER.decode([t for t, mark in zip(chat.input_ids, chat.learned, strict=True) if mark]) == "Bob<|im_end|>"
    )
    assert tokens == SftExample((5, 6, 7, 8), (False, False, True, True), 1.0)


def test_a_released_prob_is_a_mean_nll() -> None:
    assert example_of({**TOKENS, "prob": 0.7}, TOKENIZER, "released_v1").weight == pytest.approx(
        math.exp(-0.7), abs=1e-12
    )
    assert example_of({**TOKENS, "prob": 0.7}, TOKENIZER, "none").weight == 1.0


def test_the_first_rows_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{**TOKENS, "weight": i} for i in range(5)])
    assert [example.weight for example in read_examples(path, TOKENIZER, max_samples=2)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("row", "weighting", "message"),
    [
        ({"question": "Who?"}, "given", r"no messages \(keys: question\)"),
        ({"messages": []}, "given", "no messages"),
        ({"messages": [{"role": "user"}]}, "given", "message 0 has content of type NoneType"),
        ({"messages": ["Who?"]}, "given", "message 0 is 'Who"),
        ({"messages": CHAT["messages"][:1]}, "given", "no assistant turn"),
        ({**CHAT, "weight": -0.5}, "given", r"weight=-0.5; expected a finite number of 0 or more"),
        ({**CHAT, "weight": math.nan}, "given", "weight=nan"),
        ({**CHAT, "weight": math.inf}, "given", "weight=inf"),
        ({**CHAT, "weight": "1"}, "given", "weight='1'"),
        ({**CHAT, "prob": 0.3}, "given", "set weighting=released_v1|weighting=released_v1"),
        ({**CHAT, "prob": -0.3}, "released_v1", "prob=-0.3; expected a mean negative log-likelihood"),
        ({**CHAT, "prob": math.nan}, "released_v1", "prob=nan"),
        (CHAT, "released_v1", "needs a prob"),
        ({"input_ids": [1, 2]}, "given", "without loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0, 1]}, "given", "2 tokens, but 3 marks"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1]}, "given", "first token is marked"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "given", "loss_mask holds 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "given", "marks no token"),
        ({"input_ids": [1, 99999], "loss_mask": [0, 1]}, "given", "token 99999 is not in the vocabulary of"),
        ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "given", "token -1 is not in the vocabulary"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict, weighting: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    first = {**TOKENS, "prob": 0.1} if weighting == "released_v1" else TOKENS
    path.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"train.jsonl, row 1: .*({message})"):
        read_examples(path, TOKENIZER, weighting)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", "", "holds no rows"),
        ("train.json", "[]", "holds no rows"),
        ("train.json", '{"messages": []}', "holds a JSON dict; expected an array"),
        ("train.json", "[{", "cannot be read"),
        ("train.jsonl", "{}\n{", "row 0: no messages"),
        ("train.jsonl", '{"a"', r"train.jsonl:1: .* expected one JSON object per line"),
        ("train.jsonl", "[1]\n", "row 0: list; expected an object"),
        ("train.parquet", "not a parquet", "cannot be read"),
        ("train.csv", "a", "unknown kind '.csv'"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name, TOKENIZER)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "train.jsonl", TOKENIZER)


def marks(text: str) -> tuple[bool, ...]:
    return tuple(letter == "x" for letter in text)


@pytest.mark.parametrize(
    ("learned", "length", "kept"),
    [
        ("..xx..xxx.", 10, "..xx..xxx"),
        ("..xx..xxx.", 9, "..xx..xxx"),
        ("..xx..xxx.", 8, "..xx"),
        ("..xx..xxx.", 4, "..xx"),
        ("..xx..xxx.", 3, ""),
        ("..xx", 4, "..xx"),
    ],
)
def test_an_example_is_cut_behind_a_whole_turn(learned: str, length: int, kept: str) -> None:
    example = SftExample(tuple(range(len(learned))), marks(learned), 0.5)
    short = cut_at_turn(example, length)
    assert (short.learned, short.input_ids, short.weight) == (marks(kept), tuple(range(len(kept))), 0.5)


def test_what_does_not_fit_is_dropped_or_cut_and_counted() -> None:
    examples = [SftExample(tuple(range(len(text))), marks(text)) for text in ("..x", "..x..x", "....xx", "...")]
    dropped = fit(examples, 4)
    assert dropped.examples == (examples[0],)
    assert (dropped.dropped, dropped.cut) == ({"overlong": 2, "nothing_learned": 1}, 0)
    cut = fit(examples, 4, "cut")
    assert [example.learned for example in cut.examples] == [marks("..x"), marks("..x")]
    assert (cut.dropped, cut.cut) == ({"overlong": 0, "nothing_learned": 2}, 1)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_visits_every_example_once_in_an_order_of_its_own(count: int, size: int, seed: int) -> None:
    steps = -(-count // size)
    epochs = [
        [i for step in range(e * steps, (e + 1) * steps) for i in step_examples(count, size, step + 1, seed)]
        for e in range(2)
    ]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 12 or epochs[0] != epochs[1]
    assert step_examples(count, size, 1, seed, shuffle=False) == list(range(min(size, count)))


def test_packed_rows_reset_positions_and_carry_the_weights() -> None:
    examples = [
        SftExample((5, 6, 7), (False, True, True), 2.0),
        SftExample((8, 9), (False, True), 1.0),
        SftExample((3, 4, 5, 6), (False, False, True, False), 0.5),
    ]
    rows = rows_of([3, 2, 4], row_tokens=5, ranks=1, packing=True)
    assert rows == [[2], [0, 1]]
    batch = collate(examples, rows, "token_mean", pad_id=0)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 0], [5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.action_mask.tolist() == [[False, False, True, False, False], [False, True, True, False, True]]
    # 4 learned tokens in all
    assert batch.token_weights.tolist() == [[0, 0, 0.125, 0, 0], [0, 0.5, 0.5, 0, 0.25]]
    assert batch.lengths.tolist() == [4, 5]
    assert rows_of([3, 2, 4], row_tokens=100, ranks=3, packing=True) == [[2], [0], [1]]
    assert rows_of([3, 2], row_tokens=100, ranks=1, packing=False) == [[0], [1]]
