"""Updates of actor and critic in a group of one; `test_train_worker.py` repeats them over two ranks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.toys import save_model, toy_batch
from verl.algorithms.kl import kl_penalty
from verl.algorithms.loss import ppo_policy_loss
from verl.batch import TrainBatch
from verl.workers.actor import Actor, ActorConfig
from verl.workers.critic import Critic, CriticConfig
from verl.workers.learner import UpdateConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.policy_loss import PolicyLossConfig
from verl.workers.ranks import Ranks

ALL_AT_ONCE = UpdateConfig(micro_batch_tokens=10_000, shuffle=False)


def actor_config(folder: Path, **changes) -> ActorConfig:
    """Large steps, so that five of them leave a trace."""
    base = ActorConfig(ModelConfig(str(folder), dtype="fp32"), OptimConfig(lr=3e-3), ALL_AT_ONCE)
    return replace(base, **changes)


def critic_config(folder: Path, **changes) -> CriticConfig:
    base = CriticConfig(ModelConfig(str(folder), dtype="fp32"), OptimConfig(lr=3e-3), ALL_AT_ONCE)
    return replace(base, **changes)


def snapshot(learner: Actor | Critic) -> dict[str, torch.Tensor]:
    """A copy of everything a checkpoint holds, in full."""
    state = learner.state_dict()
    return {name: getattr(value, "full_tensor", lambda value=value: value)().clone() for name, value in state.items()}


def test_one_step_equals_a_hand_written_one(tmp_path: Path, ranks: Ranks) -> None:
    plain, batch = save_model(tmp_path), toy_batch()
    loss = PolicyLossConfig(clip_high=0.3, entropy_coef=0.02, kl_coef=0.1)
    actor = Actor(actor_config(tmp_path, loss=loss, optim=OptimConfig(lr=3e-3, grad_clip=0.05)), ranks)
    stats = actor.update(batch)

    table = plain(batch.input_ids, attention_mask=batch.attention_mask.long()).logits.log_softmax(-1)[:, :-1]
    mask, targets = batch.action_mask[:, 1:], batch.input_ids[:, 1:]
    logprobs = table.gather(-1, targets[..., None]).squeeze(-1)
    entropy = -(table.exp() * table).sum(-1)[mask].mean()
    surrogate, _ = ppo_policy_loss(logprobs, batch.old_logprobs[:, 1:], batch.advantages[:, 1:], mask, 0.2, 0.3)
    kl = kl_penalty(logprobs, batch.ref_logprobs[:, 1:], "k3")[mask].mean()
    (surrogate - 0.02 * entropy + 0.1 * kl).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    torch.optim.AdamW(plain.parameters(), 3e-3, (0.9, 0.999), 1e-8, 0.01).step()

    assert stats["actor/pg_loss"] == pytest.approx(surrogate.item(), abs=1e-5)
    assert stats["actor/entropy_loss"] == pytest.approx(entropy.item(), abs=1e-5)
    assert stats["actor/kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert stats["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert stats["actor/lr"] == 3e-3
    assert stats["actor/updates"] == 1.0 and stats["actor/skipped_updates"] == 0.0
    ours = dict(actor.full_weights())
    for name, parameter in plain.named_parameters():
        # Adam's first step is the sign of the gradient times lr, so entries whose gradient is rounding noise may differ
        close = (ours[name] - parameter).abs() < 1e-4
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLossConfig(entropy_coef=0.01, kl_coef=0.05, tis_cap=2.0),
        PolicyLossConfig(aggregation="seq_mean_token_sum", dual_clip=3.0),
        PolicyLossConfig(kind="gspo", aggregation="seq_mean_token_mean", tis_cap=1.5, tis_level="sequence"),
    ],
    ids=["token_mean", "seq_sum", "gspo"],
)
def test_micro_batches_do_not_change_the_result(tmp_path: Path, ranks: Ranks, loss: PolicyLossConfig) -> None:
    save_model(tmp_path)
    histories = []
    for tokens in (10_000, 45, 1):
        update = UpdateConfig(mini_batch_size=3, epochs=2, micro_batch_tokens=tokens, seed=5)
        actor = Actor(actor_config(tmp_path, update=update, loss=loss, optim=OptimConfig(lr=1e-4)), ranks)
        histories.append([actor.update(toy_batch(seed=step)) for step in range(5)])
    for history in histories[1:]:
        for ours, wanted in zip(history, histories[0], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-5, rel=1e-4)


def test_gradient_checkpointing_does_not_change_the_result(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    plain = Actor(actor_config(tmp_path), ranks)
    saving = ModelConfig(str(tmp_path), dtype="fp32", gradient_checkpointing=True)
    recomputing = Actor(actor_config(tmp_path, model=saving), ranks)
    passes: list[int] = []
    layer = recomputing.model.causal_lm.model.layers[0].input_layernorm
    layer.register_forward_pre_hook(lambda module, args: passes.append(1))
    assert recomputing.update(toy_batch()) == pytest.approx(plain.update(toy_batch()), abs=1e-6)
    assert len(passes) == 2


def test_mini_batches_leave_out_rows_without_actions(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = toy_batch(rows=6)
    dead = batch.action_mask.clone()
    dead[[1, 4]] = False
    failed = replace(batch, action_mask=dead)
    update = replace(ALL_AT_ONCE, mini_batch_size=2)
    actor, other = (Actor(actor_config(tmp_path, update=update), ranks) for _ in range(2))
    stats = actor.update(failed)
    assert stats["actor/updates"] == 2.0
    assert other.update(batch.select(torch.tensor([0, 2, 3, 5]))) == pytest.approx(stats, abs=1e-6)


def test_nothing_to_learn_changes_nothing(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = toy_batch()
    actor = Actor(actor_config(tmp_path), ranks)
    before = snapshot(actor)
    stats = actor.update(replace(batch, action_mask=torch.zeros_like(batch.action_mask)))
    assert stats == {"actor/lr": 3e-3, "actor/updates": 0.0, "actor/skipped_updates": 0.0}
    after = snapshot(actor)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["optimizer.training_steps"]


def test_a_batch_without_old_logprobs_is_on_policy(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = replace(toy_batch(), old_logprobs=None)
    actor, other = (Actor(actor_config(tmp_path), ranks) for _ in range(2))
    stats = actor.update(batch)
    assert stats["actor/ppo_kl"] == 0.0
    recomputed = replace(batch, old_logprobs=other.log_probs(batch))
    assert other.update(recomputed) == pytest.approx(stats, abs=1e-6)
    twice = Actor(actor_config(tmp_path, update=UpdateConfig(epochs=2)), ranks)
    with pytest.raises(ValueError, match="old_logprobs"):
        twice.update(batch)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_loss_skips_the_step(tmp_path: Path, ranks: Ranks, poison: float) -> None:
    save_model(tmp_path)
    batch = toy_batch(rows=4)
    advantages = batch.advantages.clone()
    advantages[1][batch.action_mask[1]] = poison
    actor = Actor(actor_config(tmp_path), ranks)
    actor.update(batch)
    before = snapshot(actor)
    stats = actor.update(replace(batch, advantages=advantages))
    assert stats == {"actor/lr": 3e-3, "actor/updates": 0.0, "actor/skipped_updates": 1.0}
    after = snapshot(actor)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["optimizer.training_steps"]
    assert actor.update(batch)["actor/updates"] == 1.0


def test_a_broken_gradient_skips_only_its_mini_batch(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = toy_batch(rows=4)
    advantages = batch.advantages.clone()
    advantages[1] *= 1e38  # the loss stays finite, the norm of its gradient does not
    update = replace(ALL_AT_ONCE, mini_batch_size=1)
    actor = Actor(actor_config(tmp_path, update=update), ranks)
    stats = actor.update(replace(batch, advantages=advantages))
    assert stats["actor/updates"] == 3.0 and stats["actor/skipped_updates"] == 1.0
    assert all(math.isfinite(value) for value in stats.values())
    assert all(value.isfinite().all() for _, value in actor.full_weights())


def test_critic_learns_its_returns(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    critic = Critic(critic_config(tmp_path, value_clip=10.0), ranks)
    batch = toy_batch()
    values = critic.values(batch)
    assert values.dtype == torch.float32 and not values.any()  # a head of zeros
    first = critic.update(replace(batch, values=values))
    mask = batch.action_mask
    assert first["critic/vf_loss"] == pytest.approx(0.5 * batch.returns[mask].square().mean().item(), abs=1e-6)
    losses = [critic.update(replace(batch, values=critic.values(batch)))["critic/vf_loss"] for _ in range(30)]
    assert losses[-1] < 0.3 * first["critic/vf_loss"]


def test_values_are_of_the_state_before_the_token(tmp_path: Path, ranks: Ranks) -> None:
    plain = save_model(tmp_path)
    critic = Critic(critic_config(tmp_path), ranks)
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        critic.model.head.weight.copy_(torch.distributed.tensor.distribute_tensor(weight, ranks.mesh))
        batch = toy_batch()
        hidden = plain.model(batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
    values = critic.values(batch)
    for b, s in batch.action_mask.nonzero().tolist():
        assert values[b, s] == pytest.approx((hidden[b, s - 1] @ weight[0]).item(), abs=1e-5)
    assert not values[~batch.action_mask].any()


def test_critic_micro_batches_do_not_change_the_result(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    histories = []
    for tokens in (10_000, 30):
        update = UpdateConfig(mini_batch_size=4, micro_batch_tokens=tokens)
        critic = Critic(critic_config(tmp_path, update=update), ranks)
        histories.append([critic.update(toy_batch(seed=step)) for step in range(5)])
    for ours, wanted in zip(*histories, strict=True):
        # A value that did not move far counts as clipped or not by the last bit of a rounding error.
        assert ours | {"critic/vf_clipfrac": 0} == pytest.approx(wanted | {"critic/vf_clipfrac": 0}, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["actor", "critic"])
def test_state_round_trip_is_exact(tmp_path: Path, ranks: Ranks, kind: str, tied: bool) -> None:
    save_model(tmp_path, tied=tied)
    optim = OptimConfig(lr=3e-3, warmup_steps=8)
    update = UpdateConfig(mini_batch_size=3, seed=1)
    if kind == "actor":
        make = lambda: Actor(actor_config(tmp_path, optim=optim, update=update), ranks)  # noqa: E731
    else:
        make = lambda: Critic(critic_config(tmp_path, optim=optim, update=update), ranks)  # noqa: E731
    straight, resumed = make(), make()
    fresh = snapshot(straight)
    for step in range(2):
        straight.update(toy_batch(seed=step))
    saved = {name: value.clone() for name, value in straight.state_dict().items()}
    assert set(saved) == set(fresh)
    resumed.load_state_dict(saved)
    for step in range(2, 4):
        batch = toy_batch(seed=step)
        assert resumed.update(batch) == straight.update(batch)
    ours, wanted = snapshot(resumed), snapshot(straight)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_missing_tensors_are_named(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = toy_batch()
    actor = Actor(actor_config(tmp_path, loss=PolicyLossConfig(kl_coef=0.1)), ranks)
    with pytest.raises(ValueError, match="ref_logprobs"):
        actor.update(replace(batch, ref_logprobs=None))
    with pytest.raises(ValueError, match="advantages"):
        actor.update(replace(batch, advantages=None))
    with pytest.raises(ValueError, match="returns"):
        Critic(critic_config(tmp_path), ranks).update(replace(batch, returns=None))


def test_batches_may_lack_what_an_algorithm_does_not_use(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    batch = toy_batch()
    lean = TrainBatch(
        batch.input_ids,
        batch.attention_mask,
        batch.action_mask,
        batch.position_ids,
        batch.rollout_logprobs,
        batch.group_ids,
        advantages=batch.advantages,
    )
    assert Actor(actor_config(tmp_path), ranks).update(lean)["actor/updates"] == 1.0
