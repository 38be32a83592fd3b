"""The processes that share one model: who they are, and the two reductions that they need besides FSDP's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.errors import ConfigError

Device = Literal["cpu", "cuda"]

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel processes.

    Attributes:
        mesh: one-dimensional mesh over all of them; parameters are sharded over it.
        device: where this process computes.
        rank: 0 .. size - 1.
        size: number of processes.
    """

    mesh: DeviceMesh
    device: torch.device
    rank: int
    size: int

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all ranks, on this rank's device; every rank must call it."""
        summed = values.detach().to(self.device, copy=True)
        dist.all_reduce(summed, group=self.mesh.get_group())
        return summed

    def largest(self, number: int) -> int:
        """Return the largest `number` of any rank; every rank must call it."""
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return int(value)


def join_ranks(device: Device) -> Ranks:
    """Join the default process group that torchrun's environment variables describe, unless that has been done.

    Raises:
        ConfigError: a variable is missing, or `device` is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but this process sees no GPU; use hardware=cpu or a machine that has one")
    if not dist.is_initialized():
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} not set; start the worker through a WorkerGroup or torchrun, which set "
                f"{', '.join(_VARIABLES)}"
            )
        # Both backends: with offloaded parameters the gradient norm is reduced on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo")
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    return Ranks(mesh, place, dist.get_rank(), dist.get_world_size())
