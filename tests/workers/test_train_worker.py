"""The same training on one rank and on two, through Ray, FSDP2 and gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.workers.toys import save_model, toy_batch
from verl.batch import TrainBatch
from verl.errors import CheckpointError, ConfigError
from verl.single_controller.cluster import RayConfig, cluster
from verl.single_controller.placement import HardwareConfig, ResourcePool
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.actor import ActorConfig
from verl.workers.critic import CriticConfig
from verl.workers.learner import UpdateConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.policy_loss import PolicyLossConfig
from verl.workers.ranks import Ranks
from verl.workers.reference import ReferenceConfig
from verl.workers.train_worker import TrainWorker, TrainWorkerConfig


def worker_config(folder: Path) -> TrainWorkerConfig:
    model = ModelConfig(str(folder), dtype="fp32", gradient_checkpointing=True, logits_chunk=16)
    update = UpdateConfig(mini_batch_size=3, epochs=2, micro_batch_tokens=45, inference_tokens=45, seed=3)
    optim = OptimConfig(lr=1e-4, warmup_steps=3)
    loss = PolicyLossConfig(entropy_coef=0.01, kl_coef=0.05)
    return TrainWorkerConfig(
        ActorConfig(model, optim, update, loss, temperature=0.8),
        ReferenceConfig(model, temperature=0.8),
        CriticConfig(model, optim, update),
    )


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[WorkerGroup]:
    hardware = HardwareConfig(devices_per_node=2)
    # Tied embeddings are the harder case for sharding; an odd vocabulary does not divide evenly either.
    save_model(tmp_path / "base", "qwen3", tied=True)
    with cluster(RayConfig(object_store_gib=0.25, log_to_driver=False), hardware):
        pool = ResourcePool(hardware)
        group = WorkerGroup(TrainWorker, (worker_config(tmp_path / "base"),), pool.placed("train"))
        yield group
        group.close()
        pool.close()


def completed(batch: TrainBatch, call) -> TrainBatch:
    """Fill in what the models say, by `call(method, batch)`."""
    return replace(
        batch,
        old_logprobs=call("actor_log_probs", batch),
        ref_logprobs=call("ref_log_probs", batch),
        values=call("values", batch),
    )


@pytest.mark.integration
def test_two_ranks_train_as_one(tmp_path: Path, two_ranks: WorkerGroup, ranks: Ranks) -> None:
    one = TrainWorker(worker_config(tmp_path / "base"))
    for step in range(5):
        batch = toy_batch(rows=7, seed=step)
        ours = completed(batch, two_ranks.dispatch)
        wanted = completed(batch, lambda method, batch: getattr(one, method)(batch))
        for name in ("old_logprobs", "ref_logprobs", "values"):
            assert_close(getattr(ours, name), getattr(wanted, name), atol=1e-5, rtol=1e-5)
        for method in ("update_critic", "update_actor"):
            first, second = two_ranks.call(method, ours)
            assert first == second
            expected = getattr(one, method)(wanted)
            first.pop("critic/vf_clipfrac", None), expected.pop("critic/vf_clipfrac", None)
            assert first == pytest.approx(expected, abs=1e-5, rel=1e-4)

    weights, nothing = two_ranks.call("collect_weights")
    assert nothing == {}
    assert_close(weights, one.collect_weights(), atol=1e-4, rtol=0)
    lonely = toy_batch(rows=1)
    assert_close(two_ranks.dispatch("values", lonely), one.values(lonely), atol=1e-4, rtol=0)

    folder = tmp_path / "checkpoint"
    two_ranks.call("save_checkpoint", folder)
    other = TrainWorker(worker_config(tmp_path / "base"))
    other.load_checkpoint(folder)
    restored = other.collect_weights()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)
    batch = toy_batch(seed=9)
    assert other.update_actor(batch) == pytest.approx(two_ranks.call("update_actor", batch)[0], abs=1e-5, rel=1e-4)

    two_ranks.call("sleep")
    two_ranks.call("export_hf", tmp_path / "out", str(tmp_path / "base"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "critic" / "value_head.safetensors").is_file()


def test_a_checkpoint_resumes_to_the_bit(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path / "base")
    straight, resumed = (TrainWorker(worker_config(tmp_path / "base")) for _ in range(2))
    for step in range(2):
        straight.update_actor(toy_batch(seed=step))
        straight.update_critic(toy_batch(seed=step))
    straight.save_checkpoint(tmp_path / "checkpoint")
    drawn = torch.rand(3)
    resumed.load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(torch.rand(3), drawn)
    for step in range(2, 4):
        batch = toy_batch(seed=step)
        assert resumed.update_actor(batch) == straight.update_actor(batch)
        assert resumed.update_critic(batch) == straight.update_critic(batch)
    ours, wanted = resumed.collect_weights(), straight.collect_weights()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_checkpoint_of_nothing_or_of_something_else_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path / "base")
    save_model(tmp_path / "other", tied=True)
    config = worker_config(tmp_path / "base")
    worker = TrainWorker(replace(config, critic=None))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        worker.load_checkpoint(tmp_path / "nowhere")
    worker.save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"lacks .* such as 'critic"):
        TrainWorker(config).load_checkpoint(tmp_path / "checkpoint")


def test_what_is_not_hosted_is_named(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path)
    worker = TrainWorker(TrainWorkerConfig(ActorConfig(ModelConfig(str(tmp_path), dtype="fp32"))))
    with pytest.raises(ConfigError, match="hosts no critic"):
        worker.values(toy_batch())
    with pytest.raises(ConfigError, match="hosts no reference"):
        worker.ref_log_probs(toy_batch())
    with pytest.raises(ConfigError, match="connect_rollout"):
        worker.send_weights()
    with pytest.raises(ConfigError, match="use copy on a CPU"):
        worker.connect_rollout("nccl", [], 1)


def test_actor_and_reference_have_one_temperature(tmp_path: Path) -> None:
    model = ModelConfig("somewhere")
    with pytest.raises(ValueError, match=r"reference.temperature=1.0, actor.temperature=0.6"):
        TrainWorkerConfig(ActorConfig(model, temperature=0.6), ReferenceConfig(model))
