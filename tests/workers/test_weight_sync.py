from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.toys import save_model, toy_batch
from verl.agent.protocols import Sampling
from verl.batch import Batch
from verl.workers.actor import Actor, ActorConfig
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Ranks
from verl.workers.weight_sync import ActorWeights, RolloutClient, WeightReceiver, choose_transport, collect

PROMPT = (5, 9, 11, 40, 7)
SAMPLING = Sampling(temperature=1.0, max_tokens=12, seed=1)


def trained_actor(folder: Path, ranks: Ranks) -> Actor:
    """An actor that one large step took away from the model in `folder`."""
    actor = Actor(ActorConfig(ModelConfig(str(folder), dtype="fp32"), OptimConfig(lr=2e-2)), ranks)
    actor.update(toy_batch())
    return actor


def sampled_batch(prompt: tuple[int, ...], ids: tuple[int, ...], logprobs: tuple[float, ...]) -> Batch:
    tokens = torch.tensor([prompt + ids])
    action = torch.arange(tokens.shape[1])[None] >= len(prompt)
    recorded = torch.tensor([(0.0,) * len(prompt) + logprobs])
    everything = torch.ones_like(action)
    return Batch(tokens, everything, action, torch.arange(tokens.shape[1])[None], recorded, torch.tensor([0]))


@pytest.fixture
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RolloutEngine]:
    kind, tied = request.param
    save_model(tmp_path, "qwen2", tied)
    engine = create_engine(
        EngineConfig(str(tmp_path), kind, dtype="float32", max_model_len=128, max_num_seqs=4, device="cpu")
    )
    yield engine
    await engine.close()


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(("hf", False), id="hf"),
        pytest.param(("hf", True), id="hf-tied"),
        pytest.param(("vllm", False), id="vllm", marks=pytest.mark.integration),
    ],
    indirect=True,
)
async def test_after_a_sync_the_engine_samples_from_the_trained_actor(
    engine: RolloutEngine, tmp_path: Path, ranks: Ranks
) -> None:
    actor = trained_actor(tmp_path, ranks)
    stale = await engine.generate(PROMPT, SAMPLING)
    await engine.update_weights(collect(actor.full_weights(), True).items(), 1)
    fresh = await engine.generate(PROMPT, SAMPLING)
    assert (stale.weight_version, fresh.weight_version) == (0, 1)
    for generation, agrees in ((stale, False), (fresh, True)):
        batch = sampled_batch(PROMPT, generation.ids, generation.logprobs)
        worst = (actor.log_probs(batch) - batch.rollout_logprobs).abs().max().item()
        assert (worst < 1e-3) is agrees, worst


def test_what_is_announced_is_what_comes(tmp_path: Path, ranks: Ranks) -> None:
    save_model(tmp_path, tied=True)
    source = ActorWeights(Actor(ActorConfig(ModelConfig(str(tmp_path))), ranks))
    announced = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    for _ in range(2):  # every round iterates anew
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source] == announced
    assert announced[0] == ("model.embed_tokens.weight", torch.bfloat16, (97, 64))


class Recorder:
    """Stands for a rollout worker; all of them must be called at the same time."""

    def __init__(self, together: threading.Barrier) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._together = together

    def call(self, method: str, *args: Any) -> None:
        self._together.wait(timeout=10)
        self.calls.append((method, *args))


def test_every_engine_gets_ranks_of_its_own() -> None:
    together = threading.Barrier(3)
    engines = [Recorder(together) for _ in range(3)]
    client = RolloutClient(engines, devices_per_engine=2)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    assert [engine.calls[0][1]["rank_offset"] for engine in engines] == [1, 3, 5]
    wanted = ["connect_trainer", "start_weight_update", "receive_weights", "finish_weight_update"]
    for engine in engines:
        assert [call[0] for call in engine.calls] == wanted
        assert all(callable(getattr(WeightReceiver, method)) for method in wanted)
    client.init_weight_transfer_engine({"packed": True})
    assert all(engine.calls[-1] == ("connect_trainer", {"packed": True}) for engine in engines)


def test_the_hardware_chooses_the_way() -> None:
    assert choose_transport("cpu", True) == choose_transport("cpu", False) == "copy"
    assert choose_transport("cuda", True) == "ipc"
    assert choose_transport("cuda", False) == "nccl"
