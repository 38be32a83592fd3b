from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.retrieval.encoder_models import WIDTH, write_distilbert, write_xlm_roberta
from tests.retrieval.support import write_tiny_bert
from verl.retrieval.encoder_network import Head, TransformersNetwork, load_model
from verl.retrieval.encoder_packed import PackedNetwork, can_pack, rounded
from verl.retrieval.metrics import resident_bytes

TEXTS = [[2, 7, 8, 9, 3], [2, 3], [2, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3], [2, 4, 5, 6, 3], [2, 1, 3]]
POOLINGS = ("mean", "cls", "max", "last")


@pytest.fixture(scope="module", params=["bert", "xlm-roberta", "distilbert", "mpnet"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("models") / request.param
    if request.param == "bert":
        return write_tiny_bert(target, WIDTH)
    if request.param == "distilbert":
        return write_distilbert(target)
    return write_xlm_roberta(target, request.param)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_padded_and_packed_and_equal_lengths_agree(folder: Path, pooling: str, normalize: bool) -> None:
    model, head = load_model(str(folder), torch.float32), Head(pooling, normalize)
    network = TransformersNetwork(model, head)
    alone = np.concatenate([network([text]) for text in TEXTS])
    assert alone.shape == (5, WIDTH) and alone.dtype == np.float32
    network.equal_lengths = False  # as on a GPU: texts of any lengths, padded and masked
    np.testing.assert_allclose(network(TEXTS), alone, atol=1e-5)
    if can_pack(model):
        np.testing.assert_allclose(PackedNetwork(model, head)(TEXTS), alone, atol=1e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1.0, atol=1e-6)


def test_only_a_bert_in_float32_on_a_cpu_is_packed(folder: Path) -> None:
    model = load_model(str(folder), torch.float32)
    packable = folder.name in ("bert", "xlm-roberta")
    assert can_pack(model) is packable
    assert not can_pack(load_model(str(folder), torch.bfloat16))
    if packable:
        for name, value in (("hidden_act", "relu"), ("is_decoder", True)):
            setattr(model.config, name, value)
            assert not can_pack(model)
            model = load_model(str(folder), torch.float32)


def test_memory_does_not_grow_with_every_new_number_of_tokens(tmp_path: Path) -> None:
    model = load_model(str(write_tiny_bert(tmp_path / "model", WIDTH)), torch.float32)
    if not can_pack(model):
        pytest.skip("this machine packs no network")
    network = PackedNetwork(model, Head("mean", True))
    network([[2] * 64] * 10)
    before = resident_bytes(os.getpid())
    for tokens in range(1, 501):
        network([[2] * 9] * (tokens // 9) + [[2] * (tokens % 9)] * (tokens % 9 > 0))
    assert resident_bytes(os.getpid()) - before < 200 * 2**20  # three times that without rounding


def test_there_are_few_numbers_of_tokens_and_little_is_filled_up() -> None:
    sizes = [rounded(tokens) for tokens in range(1, 2049)]
    assert len(set(sizes)) < 80
    assert all(tokens <= size <= 1.125 * tokens for tokens, size in enumerate(sizes, start=1))


def test_padding_never_exceeds_the_models_positions(tmp_path: Path) -> None:
    source = write_xlm_roberta(tmp_path / "model")
    network = TransformersNetwork(AutoModel.from_pretrained(source).eval(), Head("mean", True))
    full = [0, *[5] * 30, 2]
    alone = network([full])[0]
    network.equal_lengths = False
    np.testing.assert_allclose(network([full, [0, 7, 2]])[0], alone, atol=2e-6)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[2.0, 3.0], [9.0, 1.0]]),
        ("cls", [[1.0, 4.0], [9.0, 1.0]]),
        ("max", [[3.0, 4.0], [9.0, 1.0]]),
        ("last", [[3.0, 2.0], [9.0, 1.0]]),
    ],
)
def test_pooling_by_hand(pooling: str, expected: list[list[float]]) -> None:
    hidden = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [50.0, 50.0]], [[9.0, 1.0], [50.0, 50.0], [torch.nan, 50.0]]])
    head = Head(pooling, normalize=False)
    assert head.pool(hidden, torch.tensor([2, 1])).tolist() == expected
    assert head.pool(hidden[:1, :2]).tolist() == expected[:1]
    unit = Head(pooling, normalize=True).finish(torch.tensor([[3.0, 4.0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8]], atol=1e-7)
