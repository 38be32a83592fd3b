"""Weights from GPU to GPU through vLLM's own transfer engines, trainer and engine on one device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.workers.toys import save_model, toy_batch
from verl.batch import Batch
from verl.workers.actor import Actor, ActorConfig
from verl.workers.model import ModelConfig
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Ranks
from verl.workers.weight_sync import WeightReceiver, WeightSender

pytestmark = pytest.mark.gpu

PROMPT = [5, 9, 11, 40, 7]


class Background:
    """An event loop in a thread, which is where a rollout worker's coroutines would run."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=300)


class LocalEndpoint:
    """A rollout worker in this process."""

    def __init__(self, receiver: WeightReceiver, background: Background) -> None:
        self._receiver = receiver
        self._background = background

    def call(self, method: str, *args: Any) -> Any:
        return self._background.run(getattr(self._receiver, method)(*args))


@pytest.fixture
def gpu_ranks() -> Iterator[Ranks]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(init_device_mesh("cuda", (1,)), device, 0, 1)
    dist.destroy_process_group()


async def _start_engine(folder: Path) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="bfloat16",
            max_model_len=128,
            gpu_memory_utilization=0.3,
            enforce_eager=True,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend="ipc"),
        )
    )


async def _sample(llm: Any, request: str) -> tuple[list[int], list[float]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=12, seed=1, logprobs=0)
    async for output in llm.generate({"prompt_token_ids": PROMPT}, params, request):
        last = output.outputs[0]
    return list(last.token_ids), [
        entry[token].logprob for entry, token in zip(last.logprobs, last.token_ids, strict=True)
    ]


def _difference(actor: Actor, ids: list[int], logprobs: list[float]) -> float:
    """Largest difference between the actor's log-probabilities and the engine's."""
    tokens = torch.tensor([PROMPT + ids])
    action = torch.arange(tokens.shape[1])[None] >= len(PROMPT)
    recorded = torch.tensor([[0.0] * len(PROMPT) + logprobs])
    positions = torch.arange(tokens.shape[1])[None]
    batch = Batch(tokens, torch.ones_like(action), action, positions, recorded, torch.tensor([0]))
    return (actor.log_probs(batch) - recorded).abs().max().item()


@pytest.mark.parametrize("tied", [False, True])
def test_ipc_transfer_reaches_every_weight(
    tmp_path: Path, gpu_ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    # The handles of CUDA IPC are no plain data; vLLM passes them to its own processes only if told so.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    save_model(tmp_path, tied=tied)
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path)), OptimConfig(lr=2e-2)), gpu_ranks)
    background = Background()
    llm = background.run(_start_engine(tmp_path))
    try:
        endpoint = LocalEndpoint(WeightReceiver(llm), background)
        sender = WeightSender("ipc", actor, gpu_ranks, [endpoint], devices_per_engine=1)
        actor.update(toy_batch())
        assert _difference(actor, *background.run(_sample(llm, "stale"))) > 0.2
        sender.send()
        assert _difference(actor, *background.run(_sample(llm, "fresh"))) < 0.05
        sender.close()
    finally:
        llm.shutdown()


def test_sleep_frees_the_gpu_and_waking_restores_the_bits(tmp_path: Path, gpu_ranks: Ranks) -> None:
    save_model(tmp_path)
    actor = Actor(ActorConfig(ModelConfig(str(tmp_path)), OptimConfig(lr=1e-3)), gpu_ranks)
    actor.update(toy_batch())
    before = {name: value.clone() for name, value in actor.full_weights(torch.float32)}
    awake = torch.cuda.memory_allocated()
    held = {name: value.cpu() for name, value in before.items()}
    del before
    actor.sleep()
    assert torch.cuda.memory_allocated() < 0.5 * awake
    after = dict(actor.full_weights(torch.float32))
    assert all(torch.equal(after[name].cpu(), held[name]) for name in held)
    assert actor.update(toy_batch(seed=1))["actor/updates"] == 1.0
