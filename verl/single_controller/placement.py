"""Where processes run: from a description of the hardware to Ray placement groups.

Colocated, a training worker and a rollout worker share each device (the engine sleeps while the other computes);
disaggregated, each has devices of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from verl.errors import ConfigError, WorkerError

Role = Literal["train", "rollout"]


@dataclass(frozen=True)
class HardwareConfig:
    """The machines and how training and rollout share them.

    Attributes:
        device: what the workers compute on.
        nodes: machines.
        devices_per_node: GPUs of each, or worker processes of each on the CPU.
        cpus_per_worker: CPU cores that Ray reserves for a worker.
        threads_per_worker: threads that torch uses in a worker.
        colocate: training and rollout share every device; otherwise the rollout has `rollout_devices` of its own.
        rollout_devices: devices of the rollout over all nodes, when not colocated.
        devices_per_engine: devices that one rollout engine spans (tensor parallelism).
        placement_timeout: seconds to wait for Ray to find the devices.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    nodes: int = 1
    devices_per_node: int = 1
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    colocate: bool = True
    rollout_devices: int = 0
    devices_per_engine: int = 1
    placement_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node", "threads_per_worker", "devices_per_engine"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not self.cpus_per_worker >= 0:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker} is negative")
        total = self.nodes * self.devices_per_node
        if self.colocate and self.rollout_devices:
            raise ValueError(f"rollout_devices={self.rollout_devices} with colocate=true; leave it 0: all are shared")
        if not self.colocate and not 0 < self.rollout_devices < total:
            raise ValueError(
                f"rollout_devices={self.rollout_devices} of {total} devices; with colocate=false both training and "
                f"rollout need at least one: choose 1 to {total - 1}, or raise devices_per_node"
            )
        if self.engine_devices % self.devices_per_engine:
            raise ValueError(
                f"devices_per_engine={self.devices_per_engine} does not divide the rollout's {self.engine_devices} "
                "devices"
            )
        if self.devices_per_node % self.devices_per_engine:
            raise ValueError(
                f"devices_per_engine={self.devices_per_engine} does not divide devices_per_node="
                f"{self.devices_per_node}; an engine stays on one node"
            )

    @property
    def devices(self) -> int:
        """Devices over all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def engine_devices(self) -> int:
        """Devices that the rollout uses."""
        return self.devices if self.colocate else self.rollout_devices

    @property
    def train_devices(self) -> int:
        """Devices that the training uses, one worker each."""
        return self.devices if self.colocate else self.devices - self.rollout_devices

    @property
    def engines(self) -> int:
        """Number of rollout engines."""
        return self.engine_devices // self.devices_per_engine

    @property
    def cpus(self) -> float:
        """CPU cores that Ray reserves in all."""
        return self.cpus_per_worker * (self.train_devices + self.engine_devices)


@dataclass(frozen=True)
class Slot:
    """A worker's share of a bundle.

    Attributes:
        bundle: of the placement group.
        cpus: cores that it reserves.
        gpus: share of the bundle's GPU that it reserves.
        environment: variables of this worker.
    """

    bundle: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """Where the workers of a group run.

    Attributes:
        slots: one per worker.
        group: the placement group that the slots speak of; None lets Ray choose.
    """

    slots: Sequence[Slot]
    group: PlacementGroup | None = None


def bundles(config: HardwareConfig) -> list[dict[str, float]]:
    """Return the resources of one bundle per device; disaggregated, the training's come first."""
    workers = 2 if config.colocate else 1
    bundle = {"CPU": workers * config.cpus_per_worker}
    if config.device == "cuda":
        bundle["GPU"] = 1.0
    return [dict(bundle) for _ in range(config.devices)]


def by_node(nodes: Mapping[int, str]) -> list[int]:
    """Return the bundles node by node, because Ray may spread neighbouring bundles; `nodes` has the node of each."""
    first = {node: bundle for bundle, node in sorted(nodes.items(), reverse=True)}
    return sorted(nodes, key=lambda bundle: (first[nodes[bundle]], bundle))


def slots(config: HardwareConfig, role: Role, order: Sequence[int] | None = None) -> list[Slot]:
    """Return where each worker of `role` runs: one per device for training, one per engine for rollout.

    Args:
        order: the bundles, those of one node together, so that an engine that spans several stays on one node and
            neighbouring ranks share one; as they are numbered if None.
    """
    order = range(config.devices) if order is None else order
    # Half each lets Ray put both on one GPU; it is bookkeeping and limits neither's memory.
    gpus = 0.0 if config.device == "cpu" else (0.5 if config.colocate else 1.0)
    if role == "train":
        return [Slot(bundle, config.cpus_per_worker, gpus) for bundle in order[: config.train_devices]]
    first = 0 if config.colocate else config.train_devices
    span = config.devices_per_engine
    starts = range(first, first + config.engine_devices, span)
    if span == 1:
        return [Slot(order[start], config.cpus_per_worker, gpus) for start in starts]
    # vLLM starts one process per device by itself and reads from these where; the worker only steers them.
    return [
        Slot(
            order[start],
            config.cpus_per_worker,
            0.0,
            {
                "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, order[start : start + span])),
                "VLLM_RAY_PER_WORKER_GPUS": str(gpus),
            },
        )
        for start in starts
    ]


def check_resources(config: HardwareConfig, available: Mapping[str, float]) -> None:
    """Refuse what the cluster cannot hold, before any worker starts.

    Args:
        available: Ray's resources, such as `{"CPU": 16, "GPU": 4}`.

    Raises:
        ConfigError: more GPUs or CPU cores are asked for than there are.
    """
    wanted = {"CPU": config.cpus, "GPU": float(config.devices) if config.device == "cuda" else 0.0}
    for kind, fix in (("GPU", "hardware.devices_per_node or hardware.nodes"), ("CPU", "hardware.cpus_per_worker")):
        if wanted[kind] > available.get(kind, 0.0):
            found = available.get(kind, 0.0)
            raise ConfigError(f"the hardware asks for {wanted[kind]:g} {kind}s, but there are {found:g}; lower {fix}")


class ResourcePool:
    """Reserved devices, until it is closed."""

    def __init__(self, config: HardwareConfig) -> None:
        """Reserve the devices; Ray must be running.

        Raises:
            ConfigError: the cluster has too few.
            WorkerError: it has enough, but they did not become free within `placement_timeout`.
        """
        check_resources(config, ray.cluster_resources())
        self.config = config
        self.group: PlacementGroup = placement_group(bundles(config), strategy="PACK")
        try:
            ray.get(self.group.ready(), timeout=config.placement_timeout)
        except GetTimeoutError as cause:
            remove_placement_group(self.group)
            raise WorkerError(
                f"no room for {config.devices} workers after {config.placement_timeout:g} s; resources now free: "
                f"{ray.available_resources()}; stop what else runs on the cluster"
            ) from cause
        self._nodes: Mapping[int, str] = placement_group_table(self.group)["bundles_to_node_id"]

    def placed(self, role: Role) -> Placed:
        """Return where the workers of `role` run."""
        return Placed(slots(self.config, role, by_node(self._nodes)), self.group)

    def close(self) -> None:
        """Give the devices back; workers that still run there end."""
        remove_placement_group(self.group)
