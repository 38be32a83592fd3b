from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.workers.toys import KINDS, save_model, toy_batch
from verl.errors import ConfigError
from verl.workers.actor import Actor, ActorConfig
from verl.workers.learner import UpdateConfig
from verl.workers.model import ModelConfig, load_causal_lm
from verl.workers.ranks import Ranks
from verl.workers.reference import Reference, ReferenceConfig


def expected(model, batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from all the logits of a plain model, with a mask and positions."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), position_ids=batch.position_ids
    ).logits
    table = (logits.double() / temperature).log_softmax(-1)
    logprobs, entropies = torch.zeros_like(batch.rollout_logprobs), torch.zeros_like(batch.rollout_logprobs)
    for b, s in batch.action_mask.nonzero().tolist():
        logprobs[b, s] = table[b, s - 1, batch.input_ids[b, s]]
        entropies[b, s] = -(table[b, s - 1].exp() * table[b, s - 1]).sum()
    return logprobs, entropies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_equal_to_plain_transformers(tmp_path: Path, kind: str, tied: bool, temperature: float) -> None:
    plain, batch = save_model(tmp_path, kind, tied), toy_batch()
    model = load_causal_lm(ModelConfig(str(tmp_path), dtype="fp32"))
    logprobs, entropies = model.eval()(batch.input_ids, batch.action_mask, temperature)
    want = expected(plain, batch, temperature)
    assert_close(logprobs, want[0], atol=1e-5, rtol=1e-5)
    assert_close(entropies, want[1], atol=1e-5, rtol=1e-5)
    assert logprobs.dtype == entropies.dtype == torch.float32


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_change_neither_results_nor_gradients(tmp_path: Path, tied: bool, entropy_grad: bool) -> None:
    save_model(tmp_path, "qwen3", tied)
    batch = toy_batch()
    results = []
    for chunk in (3, 1000):
        model = load_causal_lm(ModelConfig(str(tmp_path), dtype="fp32", logits_chunk=chunk)).train()
        logprobs, entropies = model(batch.input_ids, batch.action_mask, 0.7, entropy_grad)
        loss = (logprobs * batch.advantages).sum() + (entropies.sum() if entropy_grad else 0)
        loss.backward()
        results.append((logprobs, entropies, *(p.grad for p in model.parameters())))
    assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_gradients_equal_those_of_plain_transformers(tmp_path: Path) -> None:
    plain, batch = save_model(tmp_path), toy_batch()
    model = load_causal_lm(ModelConfig(str(tmp_path), dtype="fp32", logits_chunk=4)).train()
    logprobs, entropies = model(batch.input_ids, batch.action_mask, 1.0, True)
    (logprobs * batch.advantages + 0.1 * entropies).sum().backward()
    wanted = expected(plain, batch, 1.0)
    (wanted[0] * batch.advantages + 0.1 * wanted[1]).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_never_more_logits_than_a_chunk(tmp_path: Path) -> None:
    save_model(tmp_path)
    model = load_causal_lm(ModelConfig(str(tmp_path), dtype="fp32", logits_chunk=5))
    seen: list[int] = []
    model.causal_lm.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape[0]))
    batch = toy_batch()
    logprobs, _ = model.train()(batch.input_ids, batch.action_mask)
    logprobs.sum().backward()
    actions = int(batch.action_mask.sum())
    assert max(seen) == 5
    assert sum(seen) == 2 * actions  # once forward, once more in the backward pass


def test_no_selected_token_still_reaches_every_parameter(tmp_path: Path) -> None:
    save_model(tmp_path)
    model = load_causal_lm(ModelConfig(str(tmp_path), dtype="fp32")).train()
    logprobs, _ = model(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
    logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("tokens", [1, 45, 10_000])
def test_actor_and_reference_in_micro_batches(tmp_path: Path, ranks: Ranks, tokens: int) -> None:
    plain, batch = save_model(tmp_path), toy_batch()
    model = ModelConfig(str(tmp_path), dtype="fp32")
    actor = Actor(ActorConfig(model, update=UpdateConfig(inference_tokens=tokens), temperature=0.6), ranks)
    reference = Reference(ReferenceConfig(model, inference_tokens=tokens, temperature=0.6), ranks)
    with torch.no_grad():
        want, _ = expected(plain, batch, 0.6)
    assert_close(actor.log_probs(batch), want, atol=1e-5, rtol=1e-5)
    assert_close(reference.log_probs(batch), want, atol=1e-5, rtol=1e-5)


def test_bf16_computes_in_bf16_and_answers_in_float32(tmp_path: Path, ranks: Ranks) -> None:
    plain, batch = save_model(tmp_path), toy_batch()
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path))), ranks)
    logprobs = actor.log_probs(batch)
    with torch.no_grad():
        exact, _ = expected(plain, batch, 1.0)
    assert logprobs.dtype == torch.float32
    error = (logprobs - exact).abs().max()
    assert 1e-4 < error < 0.5
    assert all(p.dtype == torch.float32 for p in actor.model.parameters())


def test_a_model_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    plain = save_model(tmp_path)
    plain.config.final_logit_softcapping = 30.0
    plain.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        load_causal_lm(ModelConfig(str(tmp_path)))


def test_a_missing_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_causal_lm(ModelConfig(str(tmp_path / "nowhere")))
