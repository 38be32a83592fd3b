"""Entailment by a real, tiny cross-encoder with random weights, and by comparison of words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from verl.errors import ConfigError
from verl.rewards.entailment import EntailmentConfig, NliEntailment, create_entailment, entailment_label

WORDS = (
    *("where", "is", "it", "paris", "rome", "the", "capital", "of", "france", "and"),
    *("italy", "in", "a", "an", "big", "city"),
)
LABELS = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
PAIRS = [
    ("paris", "rome"),
    ("rome", "paris"),
    ("paris is the capital of france and rome is the capital of italy", "paris is big"),
    ("paris", "rome"),
    ("in the city", "it is a city in italy and the capital of italy"),
    ("", "paris"),
]


def save(folder: Path, labels: dict[int, str]) -> Path:
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.8,
        hidden_dropout_prob=0.5,
        num_labels=len(labels),
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("nli") / "model", LABELS)


def by_hand(checkpoint: Path, pairs: Sequence[tuple[str, str]], label: int) -> list[float]:
    """Ask the model pair by pair, with ids put together here."""
    model = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    ids = {word: 5 + index for index, word in enumerate(WORDS)}
    found = []
    for first, second in pairs:
        left, right = ([ids[word] for word in text.split()] for text in (first, second))
        tokens = torch.tensor([[2, *left, 3, *right, 3]])
        types = torch.tensor([[0] * (len(left) + 2) + [1] * (len(right) + 1)])
        with torch.inference_mode():
            logits = model(input_ids=tokens, token_type_ids=types).logits[0]
        found.append(float(torch.exp(logits)[label] / torch.exp(logits).sum()))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 32])
async def test_probabilities_are_the_models_whatever_shares_the_batch(checkpoint: Path, batch_size: int) -> None:
    entailment = NliEntailment(EntailmentConfig(model=str(checkpoint), batch_size=batch_size))
    wanted = by_hand(checkpoint, PAIRS, 2)
    found = await entailment(PAIRS)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.1
    assert await entailment(PAIRS[::-1]) == pytest.approx(wanted[::-1], abs=1e-5)
    assert await entailment([]) == ()
    assert entailment.truncated == 0


async def test_concurrent_callers_get_their_own_answers(checkpoint: Path) -> None:
    entailment = create_entailment(EntailmentConfig(model=str(checkpoint), batch_size=2))
    wanted = by_hand(checkpoint, PAIRS, 2)
    found = await asyncio.gather(*(entailment(PAIRS[start:]) for start in range(4)))
    for start in range(4):
        assert found[start] == pytest.approx(wanted[start:], abs=1e-5)


async def test_the_label_is_read_from_the_model_not_assumed(tmp_path: Path) -> None:
    first = save(tmp_path / "first", {0: "entailment", 1: "not_entailment"})
    entailment = NliEntailment(EntailmentConfig(model=str(first)))
    assert await entailment(PAIRS) == pytest.approx(by_hand(first, PAIRS, 0), abs=1e-5)
    unnamed = save(tmp_path / "unnamed", {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(ConfigError, match="has the labels LABEL_0, LABEL_1; expected one called entailment"):
        await NliEntailment(EntailmentConfig(model=str(unnamed)))(PAIRS)


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        (LABELS, 2),
        ({0: "entailment", 1: "neutral", 2: "contradiction"}, 0),
        ({0: "not_entailment", 1: " Entailment"}, 1),
    ],
)
def test_labels(labels: dict[int, str], index: int) -> None:
    assert entailment_label(labels, "m") == index


async def test_long_pairs_are_cut_counted_and_logged_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    entailment = NliEntailment(EntailmentConfig(model=str(checkpoint), max_length=16))
    long = ("paris is the capital of france " * 10, "paris is big")
    with caplog.at_level(logging.WARNING):
        found = await entailment([long, ("paris", "rome")])
        again = await entailment([long])
    assert entailment.truncated == 2
    assert [record.message for record in caplog.records] == [
        "a pair of 66 tokens is cut to max_length=16 (further ones are only counted)"
    ]
    assert again[0] == pytest.approx(found[0], abs=1e-5)
    # A pair of exactly 16 tokens is whole: 3 of its own, 9 and 4 words.
    whole = replace(entailment.config, max_length=16)
    exact = NliEntailment(whole)
    await exact([("paris is the capital of france and a city", "rome is the big")])
    assert exact.truncated == 0


async def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    entailment = create_entailment(EntailmentConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"entailment\.model=.*nothing does not load .*kind=same_normalised"):
        await entailment(PAIRS)


async def test_same_normalised() -> None:
    entailment = create_entailment(EntailmentConfig(kind="same_normalised"))
    pairs = [("Where? The Paris.", "where? paris"), ("Where? Paris", "Where? in Paris"), ("", "")]
    assert await entailment(pairs) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_wrong_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0; expected at least 1"):
        EntailmentConfig(**{name: 0})
