"""Weights from the actor to the rollout engines.

Three ways, of which the hardware decides: on the CPU rank 0 hands out a copy through shared memory; on GPUs vLLM's
own weight-transfer engines move it, over CUDA IPC where trainer and engine share a GPU, over NCCL where they do not.
For the latter two an engine must have been created with `weight_transfer_config=WeightTransferConfig(backend=...)`.
vLLM is imported when a sender is made, so training on a machine without it works.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from verl.errors import ConfigError
from verl.workers.actor import Actor
from verl.workers.ranks import Ranks

Transport = Literal["copy", "ipc", "nccl"]


class RolloutEndpoint(Protocol):
    """A rollout worker in another process, which has the methods of `WeightReceiver`."""

    def call(self, method: str, *args: Any) -> Any:
        """Call `method` there and wait for the answer."""
        ...


class WeightReceiver:
    """The rollout's end of vLLM's weight transfer, around an `AsyncLLM`; a rollout worker exposes these methods.

    No generation may be in flight between `start_weight_update` and `finish_weight_update`.
    """

    def __init__(self, llm: Any) -> None:
        """Receive for `llm`, a `vllm.v1.engine.async_llm.AsyncLLM` that was created with a `weight_transfer_config`."""
        self._llm = llm

    async def connect_trainer(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer group."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Wait for requests that still leave the engine, drop the prefix cache of the old weights, and make ready."""
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        await self._llm.start_weight_update()

    async def receive_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive what the trainer sends now."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self) -> None:
        """Put the received weights into use."""
        await self._llm.finish_weight_update()
        await self._llm.resume_generation()


def choose_transport(device: str, colocated: bool) -> Transport:
    """Return how weights travel on this hardware."""
    if device == "cpu":
        return "copy"
    return "ipc" if colocated else "nccl"


def collect(weights: Iterable[tuple[str, Tensor]], keeps: bool) -> dict[str, Tensor]:
    """Gather full weights on the CPU of the rank that keeps them; the others take part and return nothing."""
    kept = {}
    for name, tensor in weights:
        if keeps:
            kept[name] = tensor.cpu()
    return kept


class ActorWeights:
    """The actor's weights as vLLM's trainer engines want them (its `WeightSource`): what there is, and then it."""

    def __init__(self, actor: Actor) -> None:
        """Speak for `actor`, in its compute dtype."""
        self._actor = actor

    def metadata(self) -> list[Any]:
        """Return name, dtype and full shape of every parameter, in the order of iteration, without gathering."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self._actor.weight_shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Gather one parameter after the other; all ranks iterate in step."""
        return self._actor.full_weights()


class RolloutClient:
    """All rollout engines as the one inference engine that vLLM's trainer engines talk to."""

    def __init__(self, endpoints: Sequence[RolloutEndpoint], devices_per_engine: int) -> None:
        """Talk to `endpoints`, each of which spans `devices_per_engine` GPUs."""
        self._endpoints = endpoints
        self._span = devices_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Start the handshake; each engine gets ranks of its own in the transfer's NCCL group."""
        offset = init_info.get("rank_offset")

        def own(index: int) -> dict[str, Any]:
            return init_info if offset is None else init_info | {"rank_offset": offset + index * self._span}

        self._all(lambda index, endpoint: endpoint.call("connect_trainer", own(index)))

    def start_weight_update(self) -> None:
        """Make the engines ready to receive."""
        self._all(lambda _, endpoint: endpoint.call("start_weight_update"))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Let the engines receive what `update_info` describes."""
        self._all(lambda _, endpoint: endpoint.call("receive_weights", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the received weights into use."""
        self._all(lambda _, endpoint: endpoint.call("finish_weight_update"))

    def _all(self, call: Callable[[int, RolloutEndpoint], Any]) -> None:
        """Call all engines at the same time, because NCCL needs every receiver to arrive."""
        with ThreadPoolExecutor(len(self._endpoints)) as pool:
            list(pool.map(call, range(len(self._endpoints)), self._endpoints))


class WeightSender:
    """This rank's end of vLLM's weight transfer; every rank makes one, and all send together."""

    def __init__(
        self,
        transport: Transport,
        actor: Actor,
        ranks: Ranks,
        endpoints: Sequence[RolloutEndpoint],
        devices_per_engine: int,
    ) -> None:
        """Connect to the engines, which must be awake.

        Raises:
            ConfigError: the transport or the device is not one of a GPU.
        """
        if transport not in ("ipc", "nccl") or ranks.device.type != "cuda":
            raise ConfigError(
                f"transport={transport!r} on {ranks.device.type}: ipc and nccl need GPUs; use copy on a CPU"
            )
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        torch.cuda.set_device(ranks.device)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(transport, ranks, len(endpoints) * devices_per_engine),
            client=RolloutClient(endpoints, devices_per_engine),
            source=ActorWeights(actor),
        )

    def send(self) -> None:
        """Send all weights; returns when every engine uses them."""
        self._engine.send_weights()

    def close(self) -> None:
        """Leave the transfer's process group."""
        self._engine.shutdown()


def _init_info(transport: Transport, ranks: Ranks, receivers: int) -> Any:
    if transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=ranks.rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    # Only rank 0 sends, so the group is it and the receivers; the other ranks never look at address and port.
    return NCCLTrainerInitInfo(os.environ["MASTER_ADDR"], port, 1 + receivers, rank=ranks.rank)
