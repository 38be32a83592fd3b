"""Fine-tuning in a group of one; `tests/trainer/test_sft_ranks.py` repeats it over two ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.workers.toys import VOCABULARY, save_model
from verl.batch import WeightedBatch
from verl.errors import ConfigError
from verl.trainer.sft_batch import collate, rows_of
from verl.trainer.sft_data import SftExample
from verl.workers.learner import UpdateConfig
from verl.workers.lora import LoraConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Ranks
from verl.workers.sft import SftWorker, SftWorkerConfig


def toy_examples(count: int = 6, seed: int = 0) -> list[SftExample]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 17, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        learned = [False, *(torch.rand(length - 1, generator=generator) < 0.5).tolist()]
        learned[2] = True
        examples.append(SftExample(tuple(ids), tuple(learned), float(torch.rand((), generator=generator)) + 0.1))
    return examples


def batch_of(examples: Sequence[SftExample], packed: bool = False, reduction="token_mean", micro=None) -> WeightedBatch:
    rows = rows_of([len(example.input_ids) for example in examples], 30, 1, packed)
    return collate(examples, rows, reduction, micro)


def worker(folder: Path, micro_tokens: int = 10_000, **changes) -> SftWorker:
    base = SftWorkerConfig(
        ModelConfig(str(folder), dtype="fp32", logits_chunk=16),
        OptimConfig(lr=3e-3, grad_clip=None),
        UpdateConfig(micro_batch_tokens=micro_tokens, shuffle=False),
    )
    return SftWorker(replace(base, **changes))


def losses(model, example: SftExample) -> torch.Tensor:
    """The losses of an example's learned tokens, alone and without any of our code."""
    ids = torch.tensor([example.input_ids])
    table = model(ids).logits[0].double().log_softmax(-1)
    places = [i for i, mark in enumerate(example.learned) if mark]
    return torch.stack([-table[i - 1, example.input_ids[i]] for i in places])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("reduction", "micro"), [("token_mean", None), ("sequence_mean", None), ("released_v1", None), ("released_v1", 2)]
)
def test_the_weighted_loss_equals_a_hand_computed_one(
    tmp_path: Path, ranks: Ranks, reduction: str, micro: int | None, packed: bool
) -> None:
    plain, examples = save_model(tmp_path), toy_examples()
    with torch.no_grad():
        each = [losses(plain, example) for example in examples]
    weights, count = [example.weight for example in examples], len(examples)
    wanted = {
        "token_mean": sum(w * x.sum() for w, x in zip(weights, each, strict=True)) / sum(len(x) for x in each),
        "sequence_mean": sum(w * x.mean() for w, x in zip(weights, each, strict=True)) / count,
        "released_v1": sum(4 * w * x.mean() for w, x in zip(weights, each, strict=True)) * (micro or count) / count,
    }[reduction]
    stats = worker(tmp_path).update(batch_of(examples, packed, reduction, micro))
    assert stats["sft/loss"] == pytest.approx(float(wanted), abs=1e-6, rel=1e-6)
    assert stats["sft/nll"] == pytest.approx(float(torch.cat(each).mean()), abs=1e-6)


def test_a_step_moves_the_weights_as_a_hand_written_one_does(tmp_path: Path, ranks: Ranks) -> None:
    plain, examples = save_model(tmp_path), toy_examples()
    tuned = worker(tmp_path)
    stats = tuned.update(batch_of(examples, reduction="sequence_mean"))
    loss = sum(example.weight * losses(plain, example).mean() for example in examples) / len(examples)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.optim.AdamW(plain.parameters(), 3e-3, (0.9, 0.999), 1e-8, 0.01).step()
    assert stats["sft/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    tuned.export_hf(tmp_path / "out", str(tmp_path))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, parameter in plain.named_parameters():
        # Adam's first step is the sign of the gradient times lr, so entries whose gradient is noise may differ.
        assert ((ours[name] - parameter).abs() < 1e-4).float().mean() > 0.99, name


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_example_sees_another_of_its_row(tmp_path: Path, ranks: Ranks, kind: str, attention: str) -> None:
    plain, examples = save_model(tmp_path, kind), toy_examples(count=7)
    model = ModelConfig(str(tmp_path), dtype="fp32", attention=attention)
    tuned = worker(tmp_path, model=model)
    batch = batch_of(examples, packed=True)
    assert len(batch) < len(examples)
    nll = tuned.nll(batch)
    rows = rows_of([len(example.input_ids) for example in examples], 30, 1, True)
    with torch.no_grad():
        wanted = [torch.cat([losses(plain, examples[i]) for i in row]) for row in rows]
    for found, mask, row in zip(nll, batch.action_mask, wanted, strict=True):
        assert_close(found[mask], row.float(), atol=1e-5, rtol=0)


def test_neither_packing_nor_micro_batches_change_the_result(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    histories = []
    for packed, tokens in ((False, 10_000), (True, 10_000), (True, 1), (False, 20)):
        tuned = worker(tmp_path, tokens, optim=OptimConfig(lr=1e-4))
        histories.append([tuned.update(batch_of(toy_examples(seed=step), packed)) for step in range(4)])
    for history in histories[1:]:
        for ours, wanted in zip(history, histories[0], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-5, rel=1e-4)


def test_an_example_of_weight_0_teaches_nothing(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    examples = toy_examples(count=3)
    silent = [replace(examples[0], weight=0.0), *examples[1:]]
    other = [replace(silent[0], input_ids=tuple(reversed(examples[0].input_ids))), *examples[1:]]
    first, second = (worker(tmp_path).update(batch_of(rows, reduction="sequence_mean")) for rows in (silent, other))
    assert first["sft/loss"] == pytest.approx(second["sft/loss"], abs=1e-6)
    assert first["sft/grad_norm"] == pytest.approx(second["sft/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_loss_skips_the_step_and_is_counted(tmp_path: Path, ranks: Ranks, poison: float) -> None:
    save_model(tmp_path)
    tuned, batch = worker(tmp_path), batch_of(toy_examples())
    broken = replace(batch, token_weights=batch.token_weights.masked_fill(batch.action_mask, poison))
    before = tuned.nll(batch)
    stats = tuned.update(broken)
    assert (stats["sft/updates"], stats["sft/skipped_updates"]) == (0.0, 1.0)
    assert torch.equal(tuned.nll(batch), before)
    assert tuned.update(batch)["sft/updates"] == 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_train_alone_and_are_merged_on_export(tmp_path: Path, ranks: Ranks, tied: bool) -> None:
    plain = save_model(tmp_path, tied=tied)
    tuned = worker(tmp_path, lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj")))
    batch = batch_of(toy_examples())
    first = tuned.update(batch)["sft/nll"]
    with torch.no_grad():
        wanted = torch.cat([losses(plain, example) for example in toy_examples()]).mean()
    assert first == pytest.approx(float(wanted), abs=1e-6)  # an adapter is 0 at first
    for _ in range(5):
        last = tuned.update(batch)["sft/nll"]
    assert last < first - 0.05
    tuned.export_hf(tmp_path / "out", str(tmp_path))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    state, base = merged.state_dict(), plain.state_dict()
    assert set(state) == set(base)
    moved = {name for name in base if not torch.equal(state[name], base[name])}
    assert moved == {
        f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    with torch.no_grad():
        found = torch.cat([losses(merged, example) for example in toy_examples()])
    assert float(found.mean()) == pytest.approx(float(tuned.nll(batch).sum() / batch.action_mask.sum()), abs=1e-5)


def test_all_linear_leaves_the_output_layer_and_an_unknown_target_is_named(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    names = worker(tmp_path, lora=LoraConfig(rank=2))._learner.state_dict()
    adapted = {name.removesuffix(".lora_a") for name in names if name.startswith("model.") and name.endswith(".lora_a")}
    assert len(adapted) == 2 * 7 and not any("lm_head" in name for name in adapted)
    with pytest.raises(ConfigError, match=r"lora.targets names query; the model's linear layers are down_proj"):
        worker(tmp_path, lora=LoraConfig(targets=("query",)))
