"""Sharded checkpoints that load on any number of ranks, and the random generators that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from verl.errors import CheckpointError
from verl.workers.ranks import Ranks


class Stateful(Protocol):
    """Something whose state is tensors by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them."""
        ...


def save(folder: Path, parts: Mapping[str, Stateful], ranks: Ranks) -> None:
    """Write the state of `parts` and this rank's random generators into `folder`; all ranks call it.

    Raises:
        CheckpointError: it could not be written.
    """
    state = {f"{part}.{key}": value for part, owner in parts.items() for key, value in owner.state_dict().items()}
    try:
        dcp.save(state | _random_state(ranks), checkpoint_id=folder)
    except (OSError, CheckpointException) as cause:
        raise CheckpointError(f"{folder} could not be written: {cause}") from cause


def load(folder: Path, parts: Mapping[str, Stateful], ranks: Ranks) -> None:
    """Restore what `save` wrote; all ranks call it.

    A rank that the saving run did not have keeps the random generators of its own seed.

    Raises:
        CheckpointError: there is no whole checkpoint in `folder`, or it is of other models.
    """
    states = {part: owner.state_dict() for part, owner in parts.items()}
    wanted = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
    stored = _stored_names(folder)
    if missing := sorted(wanted.keys() - stored):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(wanted)} entries, such as {missing[0]!r}; it belongs to another "
            "model or was written without that part"
        )
    generators = {name: value for name, value in _random_state(ranks).items() if name in stored}
    try:
        # Loading goes into the live tensors, so nothing is held twice.
        dcp.load(wanted | generators, checkpoint_id=folder)
    except (OSError, ValueError, CheckpointException) as cause:
        raise CheckpointError(f"{folder} does not fit the models: {cause}") from cause
    for part, owner in parts.items():
        owner.load_state_dict(states[part])
    _restore_random(generators, ranks)


def _stored_names(folder: Path) -> set[str]:
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder} holds no whole checkpoint (no .metadata); resume from another one")
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {f"random.{ranks.rank}.cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"random.{ranks.rank}.cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _restore_random(state: Mapping[str, Tensor], ranks: Ranks) -> None:
    if (cpu := state.get(f"random.{ranks.rank}.cpu")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := state.get(f"random.{ranks.rank}.cuda")) is not None:
        torch.cuda.set_rng_state(cuda, ranks.device)
