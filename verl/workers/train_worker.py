"""One process per device that hosts actor, critic and reference, which share its process group.

A plain class: `WorkerGroup` runs it in Ray actors, torchrun can run it as well.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from verl.batch import Batch, TrainBatch
from verl.errors import ConfigError
from verl.workers.actor import Actor, ActorConfig
from verl.workers.checkpoint import Stateful, load, save
from verl.workers.critic import Critic, CriticConfig
from verl.workers.ranks import Device, Ranks, join_ranks
from verl.workers.reference import Reference, ReferenceConfig
from verl.workers.weight_sync import RolloutEndpoint, Transport, WeightSender, collect

M = TypeVar("M", Reference, Critic)


@dataclass(frozen=True)
class TrainWorkerConfig:
    """What a training process hosts.

    Attributes:
        reference: null where no KL is asked for.
        critic: null where no values are asked for.
        device: what it computes on.
        threads: of torch in this process.
        seed: of torch's generators; each rank adds its number.
    """

    actor: ActorConfig
    reference: ReferenceConfig | None = None
    critic: CriticConfig | None = None
    device: Device = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}; expected at least 1")
        if self.reference is not None and self.reference.temperature != self.actor.temperature:
            raise ValueError(
                f"reference.temperature={self.reference.temperature}, actor.temperature={self.actor.temperature}; "
                "the KL compares the distributions that are sampled, so set both alike"
            )


class TrainWorker:
    """Every method is collective: all workers of the group are called, with the arguments that it asks for."""

    def __init__(self, config: TrainWorkerConfig) -> None:
        """Join the process group and load the models.

        Raises:
            ConfigError: a model does not load, the device is not there, or the rendezvous is not described.
        """
        torch.set_num_threads(config.threads)
        self._ranks: Ranks = join_ranks(config.device)
        torch.manual_seed(config.seed + self._ranks.rank)
        self._actor = Actor(config.actor, self._ranks)
        self._reference = Reference(config.reference, self._ranks) if config.reference else None
        self._critic = Critic(config.critic, self._ranks) if config.critic else None
        self._sender: WeightSender | None = None

    def actor_log_probs(self, batch: Batch) -> Tensor:
        """See `Actor.log_probs`; each worker gets rows of its own (dispatch)."""
        return self._actor.log_probs(batch)

    def ref_log_probs(self, batch: Batch) -> Tensor:
        """See `Reference.log_probs`; each worker gets rows of its own (dispatch)."""
        return _hosted(self._reference, "reference").log_probs(batch)

    def values(self, batch: Batch) -> Tensor:
        """See `Critic.values`; each worker gets rows of its own (dispatch)."""
        return _hosted(self._critic, "critic").values(batch)

    def update_actor(self, batch: TrainBatch) -> dict[str, float]:
        """See `Actor.update`; each worker gets the whole batch (call) and answers the same stats."""
        return self._actor.update(batch)

    def update_critic(self, batch: TrainBatch) -> dict[str, float]:
        """See `Critic.update`; each worker gets the whole batch (call) and answers the same stats."""
        return _hosted(self._critic, "critic").update(batch)

    def save_checkpoint(self, folder: Path) -> None:
        """Write models, optimizers, schedules, the order of sequences and random generators into `folder`.

        Raises:
            CheckpointError: it could not be written.
        """
        save(folder, self._parts(), self._ranks)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote on any number of workers.

        Raises:
            CheckpointError: there is no whole checkpoint, or it is of other models.
        """
        self.wake()
        load(folder, self._parts(), self._ranks)

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        """Write the actor into `folder`, and the critic, if there is one, into `folder/critic`."""
        self._actor.export_hf(folder, tokenizer_path)
        if self._critic is not None:
            self._critic.export_hf(folder / "critic", tokenizer_path)
        # No worker goes on to replace what another still writes or reads.
        dist.barrier()

    def collect_weights(self) -> dict[str, Tensor]:
        """Return the actor's weights on the CPU by their Hugging Face names; empty on all ranks but 0."""
        return collect(self._actor.full_weights(), self._ranks.rank == 0)

    def connect_rollout(
        self, transport: Transport, endpoints: Sequence[RolloutEndpoint], devices_per_engine: int
    ) -> None:
        """Connect to the rollout engines for `send_weights`; see `WeightSender`."""
        self._sender = WeightSender(transport, self._actor, self._ranks, endpoints, devices_per_engine)

    def send_weights(self) -> None:
        """Send the actor's weights from GPU to GPU; returns when every engine uses them.

        Raises:
            ConfigError: `connect_rollout` was not called.
        """
        if self._sender is None:
            raise ConfigError("send_weights before connect_rollout; connect the rollout engines first")
        self._sender.send()

    def sleep(self) -> None:
        """Leave the device to the rollout engine; whatever is called next wakes what it needs."""
        for model in (self._actor, self._critic, self._reference):
            if model is not None:
                model.sleep()

    def wake(self) -> None:
        """Bring actor and critic back to the device."""
        for model in (self._actor, self._critic):
            if model is not None:
                model.wake()

    def _parts(self) -> dict[str, Stateful]:
        parts: Iterable[tuple[str, Stateful | None]] = (("actor", self._actor), ("critic", self._critic))
        return {name: part for name, part in parts if part is not None}


def _hosted(model: M | None, name: str) -> M:
    if model is None:
        raise ConfigError(f"this worker hosts no {name}; set `{name}` in its configuration")
    return model
