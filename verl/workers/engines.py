"""Rollout engines: what they share, and the factory.

Both engines take token ids and return the sampled ids with their log-probabilities under the distribution they were
drawn from (after temperature, top-k and top-p; the plain log-softmax at temperature 0). A trainer that compares them
with its own must divide its logits by the same temperature; with truncation (top-p below 1) the two differ by the
renormalisation, which is what importance weights correct.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError


@dataclass(frozen=True)
class EngineConfig:
    """How the policy is served.

    Attributes:
        model: local folder or Hugging Face name.
        kind: "vllm", or "hf" where vLLM is not to be had.
        max_model_len: longest prompt plus generation, in tokens.
        max_num_seqs: sequences decoded at a time; more wait.
        gpu_memory_utilization: share of the GPU that vLLM takes.
        enforce_eager: no CUDA graphs; always so on a CPU.
        kv_cache_gib: vLLM's key-value cache on a CPU, in GiB.
        device: of the hf engine; "auto" is CUDA where there is one.
        weight_transfer: how vLLM gets new weights: `file` in shared memory, or from GPU to GPU by its own `ipc` or
            `nccl` engine; the trainer sets it by the hardware.
        sleeps: vLLM can give its GPU memory back between rollouts (colocated training sets it).
    """

    model: str
    kind: Literal["vllm", "hf"] = "vllm"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int = 8500
    max_num_seqs: int = 64
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.6
    enforce_eager: bool = False
    prefix_caching: bool = True
    kv_cache_gib: int = 1
    device: str = "auto"
    seed: int = 0
    weight_transfer: Literal["file", "ipc", "nccl"] = "file"
    sleeps: bool = False

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "tensor_parallel_size", "kv_cache_gib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}; expected a share in (0, 1]")


class RolloutEngine(Protocol):
    """A policy engine whose weights can be replaced while it runs."""

    weight_version: int

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`; see `PolicyEngine`."""
        ...

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights, once the generations in flight have ended; later ones wait and use the new weights.

        Args:
            weights: every parameter under its Hugging Face name; a tied `lm_head.weight` may be left out.
            version: what `weight_version` becomes.

        Raises:
            EngineError: a parameter is missing, unknown or of another shape (the old weights stay), or the engine
                cannot take new weights.
        """
        ...

    async def close(self) -> None:
        """Free the engine; further calls are errors."""
        ...


def create_engine(config: EngineConfig) -> RolloutEngine:
    """Load the model and start the engine that `config.kind` names; vLLM is imported only when it is asked for.

    Raises:
        EngineError: the model cannot be loaded, or vLLM is not installed.
    """
    if config.kind == "vllm":
        try:
            from verl.workers.engine_vllm import VLLMEngine
        except ImportError as error:
            raise EngineError(f"vLLM cannot be imported ({error}); install it, or set engine.kind=hf") from error
        return VLLMEngine(config)
    from verl.workers.engine_hf import HFEngine

    return HFEngine.load(config)


class UpdateGate:
    """Many generations at a time, or one weight update; so every generation has exactly one weight version.

    A waiting update goes before new generations, else a stream of them could hold it off for ever.
    """

    def __init__(self) -> None:
        self._generating = 0
        self._updates = 0
        self._one_update = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()

    @asynccontextmanager
    async def generation(self) -> AsyncIterator[None]:
        """Hold off updates; waits while one is waiting or running."""
        while self._updates:
            await self._open.wait()
        self._generating += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._generating -= 1
            if not self._generating:
                self._idle.set()

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        """Wait until no generation and no other update runs, and hold off both."""
        self._updates += 1
        self._open.clear()
        try:
            async with self._one_update:
                await self._idle.wait()
                yield
        finally:
            self._updates -= 1
            if not self._updates:
                self._open.set()


def token_budget(prompt_ids: Sequence[int], sampling: Sampling, max_model_len: int) -> int:
    """Return how many tokens may be sampled: `max_tokens`, or less where the context ends.

    Raises:
        EngineError: an empty prompt, no room after it, or `max_tokens` below 1.
    """
    if not prompt_ids:
        raise EngineError("got an empty prompt; expected at least one token id")
    if sampling.max_tokens < 1:
        raise EngineError(f"max_tokens={sampling.max_tokens}; expected at least 1")
    room = max_model_len - len(prompt_ids)
    if room < 1:
        raise EngineError(
            f"the prompt of {len(prompt_ids)} tokens leaves no room in max_model_len={max_model_len}; "
            "raise engine.max_model_len or lower the grammar's max_context_tokens"
        )
    return min(sampling.max_tokens, room)


def checked_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Collect `weights`, once it is certain that they replace every parameter of `model` (which may be on meta).

    Aliases, such as the `lm_head.weight` of a model with tied embeddings, are accepted and left out of the result.

    Raises:
        EngineError: a name is missing, unknown or given twice, or a shape differs.
    """
    parameters = dict(model.named_parameters())
    known: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    given: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name not in known:
            raise EngineError(
                f"unknown parameter {name!r}; expected the model's Hugging Face names, e.g. {next(iter(known))!r}"
            )
        if name in given:
            raise EngineError(f"parameter {name!r} came twice; expected every parameter once")
        if tensor.shape != known[name].shape:
            raise EngineError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(known[name].shape)}")
        given[name] = tensor
    missing = sorted(parameters.keys() - given.keys())
    if missing:
        raise EngineError(
            f"{len(missing)} parameters did not come, e.g. {missing[0]!r}; send all, or they would go stale"
        )
    return {name: given[name] for name in parameters}


def why_not_updatable(tied: bool, on_cpu: bool) -> str:
    """Return why a vLLM engine cannot take new weights; empty when it can.

    Args:
        tied: the model's output layer shares the input embeddings (`tie_word_embeddings`).
    """
    if tied and on_cpu:
        return (
            "vLLM's CPU engine keeps a packed copy of a tied lm_head that new weights do not reach, and would sample "
            "from the old one; untie the embeddings (tie_word_embeddings=false) or use engine.kind=hf"
        )
    return ""


def torch_dtype(config: EngineConfig) -> torch.dtype:
    """Return the torch dtype that `config.dtype` names."""
    return getattr(torch, config.dtype)
