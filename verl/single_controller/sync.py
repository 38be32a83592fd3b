"""Bring the actor's weights to the rollout workers."""

from __future__ import annotations

from typing import Literal

from verl.single_controller.worker_group import WorkerGroup

Transport = Literal["copy", "ipc", "nccl"]


def connect(train: WorkerGroup, rollout: WorkerGroup, transport: Transport, devices_per_engine: int) -> None:
    """Prepare the way that `publish` will take; once, when both groups stand.

    Raises:
        WorkerError: a worker failed.
    """
    if transport != "copy":
        train.call("connect_rollout", transport, rollout.endpoints(), devices_per_engine)


def publish(train: WorkerGroup, rollout: WorkerGroup, transport: Transport, version: int) -> None:
    """Make every rollout worker sample from the actor's weights, as version `version`.

    The rollout's class has `update_weights(weights, version)` for `copy`, where weights is a mapping from Hugging Face
    names to tensors; for `ipc` and `nccl` the methods of `verl.workers.weight_sync.WeightReceiver` and
    `set_weight_version(version)`.

    Raises:
        WorkerError: a worker failed.
    """
    if transport == "copy":
        rollout.call("update_weights", train.start("collect_weights").hand_over(), version)
        return
    train.call("send_weights")
    rollout.call("set_weight_version", version)
