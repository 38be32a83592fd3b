"""The rollout engine over vLLM's AsyncLLM: token ids in, token ids and log-probabilities out.

vLLM starts its core in a process of its own by spawn, so a script that creates this engine needs a `__main__` guard.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from verl.agent.protocols import Generation, Sampling
from verl.errors import EngineError, WorkerError
from verl.workers.engines import (
    EngineConfig,
    UpdateGate,
    checked_weights,
    token_budget,
    torch_dtype,
    why_not_updatable,
)
from verl.workers.weight_sync import WeightReceiver

_SHARED_MEMORY = Path("/dev/shm")
_CLOSED = "the vLLM engine is closed; create another one"
_FAILURES = (EngineGenerateError, VLLMClientError, ValueError)


class VLLMEngine:
    """A `RolloutEngine` over vLLM."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.weight_version = 0
        self._unusable = ""
        self._gate = UpdateGate()
        self._requests = itertools.count()
        self._on_cpu = current_platform.is_cpu()
        _set_environment(config)
        try:
            self._llm = AsyncLLM.from_engine_args(_arguments(config, self._on_cpu))
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM could not start with model {config.model!r}: {error}") from error
        self._tokenizer = self._llm.get_tokenizer()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`; see `PolicyEngine`.

        Raises:
            WorkerError: vLLM's process died, after which no generation can succeed; no trajectory's failure but the
                worker's, so that a run restarts instead of counting failed trajectories.
        """
        budget = token_budget(prompt_ids, sampling, self.config.max_model_len)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=budget,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._gate.generation():
            if self._unusable:
                raise EngineError(self._unusable)
            request = self._llm.generate({"prompt_token_ids": list(prompt_ids)}, params, str(next(self._requests)))
            try:
                outputs = [output async for output in request]
            except EngineDeadError as error:
                raise WorkerError(
                    f"vLLM's engine process for {self.config.model!r} died (killed, or out of memory?): {error}"
                ) from error
            except _FAILURES as error:
                raise EngineError(f"vLLM could not generate: {type(error).__name__}: {error}") from error
            return self._generation(outputs[-1].outputs[0])

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights between generations; see `RolloutEngine`.

        The tensors travel through a file in shared memory, which every worker process reads.
        """
        if self._unusable:
            raise EngineError(self._unusable)
        tied = self._llm.model_config.hf_text_config.tie_word_embeddings
        if reason := why_not_updatable(tied, self._on_cpu):
            raise EngineError(reason)
        async with self._gate.update():
            checked = checked_weights(self._skeleton, weights)
            self._unusable = f"vLLM did not take the weights of version {version} as a whole; create the engine anew"
            await self._swap(checked)
            self._unusable = ""
            self.weight_version = version

    @cached_property
    def _skeleton(self) -> torch.nn.Module:
        """The model without storage: its parameters' names and shapes."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.config.model))

    async def _swap(self, weights: dict[str, Tensor]) -> None:
        # Requests that a stop string ended leave vLLM's scheduler a moment later; pausing waits for them, and empties
        # the prefix cache, whose keys and values belong to the old weights.
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as folder:
            path = str(Path(folder) / "weights.safetensors")
            await asyncio.to_thread(_write, weights, path, torch_dtype(self.config))
            try:
                await self._llm.collective_rpc("reload_from_file", args=(path,))
            except Exception as error:  # vLLM passes a worker's failure on as a bare Exception
                raise EngineError(f"{self._unusable}: {error}") from error
        await self._llm.resume_generation()

    async def connect_trainer(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer group; needs `weight_transfer` ipc or nccl. See `WeightReceiver`."""
        await self._receiver.connect_trainer(init_info)

    async def start_weight_update(self) -> None:
        """Wait until no generation runs, hold off new ones, and make ready to receive."""
        self._updating = self._gate.update()
        await self._updating.__aenter__()
        self._unusable = "a weight update from the trainer did not finish; create the engine anew"
        await self._receiver.start_weight_update()

    async def receive_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive what the trainer sends now."""
        await self._receiver.receive_weights(update_info)

    async def finish_weight_update(self) -> None:
        """Put the received weights into use and let generations go on."""
        await self._receiver.finish_weight_update()
        self._unusable = ""
        await self._updating.__aexit__(None, None, None)

    def set_weight_version(self, version: int) -> None:
        """Say which version the received weights are."""
        self.weight_version = version

    async def sleep(self) -> None:
        """Give the GPU memory back; the weights rest on the CPU. Does nothing unless created with `sleeps`."""
        if self.config.sleeps:
            await self._llm.sleep(level=1, mode="wait")

    async def wake(self, what: Sequence[str]) -> None:
        """Take the memory back for `what`: `weights` before an update, `kv_cache` too before generating."""
        if self.config.sleeps:
            await self._llm.wake_up(tags=list(what))

    @cached_property
    def _receiver(self) -> WeightReceiver:
        if self.config.weight_transfer == "file":
            raise EngineError("engine.weight_transfer=file receives through update_weights; create it with ipc or nccl")
        return WeightReceiver(self._llm)

    async def close(self) -> None:
        """Stop vLLM's processes; may be called again."""
        self._unusable = self._unusable or _CLOSED
        if hasattr(self, "_llm"):
            self._llm.shutdown()
            del self._llm  # else its finaliser would run when the interpreter is half gone

    def _generation(self, output: CompletionOutput) -> Generation:
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a generation with {output.finish_reason!r}; expected 'stop' or 'length'")
        ids = tuple(output.token_ids)
        if output.logprobs is None:
            raise EngineError("vLLM returned no log-probabilities; expected one per sampled token")
        logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True))
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(ids, logprobs, text, output.finish_reason, self.weight_version)


def _arguments(config: EngineConfig, on_cpu: bool) -> AsyncEngineArgs:
    return AsyncEngineArgs(
        model=config.model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager or on_cpu,
        enable_prefix_caching=config.prefix_caching,
        # After a part of a prompt vLLM rewinds the request's seeded generator, which only CUDA's can do: on a CPU the
        # engine would die.
        enable_chunked_prefill=False if on_cpu else None,
        seed=config.seed,
        logprobs_mode="processed_logprobs",
        worker_extension_cls="verl.workers.vllm_extension.WeightReload",
        enable_sleep_mode=config.sleeps,
        **_transfer(config),
        disable_log_stats=True,
    )


def _transfer(config: EngineConfig) -> dict[str, Any]:
    if config.weight_transfer == "file":
        return {}
    return {"weight_transfer_config": WeightTransferConfig(backend=config.weight_transfer)}


def _set_environment(config: EngineConfig) -> None:
    """State what vLLM reads from the environment, where the user has not."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
    # The default binds every engine of a machine to the same first cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.weight_transfer == "ipc":
        # CUDA IPC handles travel pickled, between processes that we started.
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    if Path(config.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _write(weights: dict[str, Tensor], path: str, dtype: torch.dtype) -> None:
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}, path)
