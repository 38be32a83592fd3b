"""A sharded model with its optimizer: inference in micro-batches, updates over mini-batches, its state.

Actor and critic differ only in the loss that they hand in.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from verl.algorithms.balance import pack_rows
from verl.batch import Batch
from verl.workers.heads import LogProbModel, ValueModel
from verl.workers.micro_batch import mini_batches, padded, rank_micro_batches, take
from verl.workers.model import ModelConfig, Residence, shard, to_shards
from verl.workers.optim import OptimConfig, Optimizer, copy_tensors
from verl.workers.ranks import Ranks

M = TypeVar("M", LogProbModel, ValueModel)


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the mini-batch's loss.

    Attributes:
        loss: scalar to differentiate, normalised so that the average over ranks of the sums over micro-batches is the
            loss of the mini-batch.
        terms: parts of the loss, normalised alike.
        means: name to (mean over this micro-batch, the number of things it is a mean of).
    """

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    means: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


LossFunction = Callable[[Any, Tensor], LossOutput]
"""From a micro-batch of the batch's class and the normaliser (mini-batch's count / ranks) to its share of the loss."""

Count = Callable[[Tensor], Tensor]
"""From an action mask (B, S) to the number by which a loss is normalised: of its tokens, or of its sequences."""


@dataclass(frozen=True)
class UpdateConfig:
    """How a batch is cut for the updates.

    Attributes:
        mini_batch_size: sequences of one optimizer step over all ranks; null is the whole batch.
        epochs: passes over the batch.
        micro_batch_tokens: most tokens of one forward and backward pass on a rank, padding included.
        inference_tokens: the same for passes without a backward pass.
        shuffle: order the sequences anew in each pass.
        seed: of the shuffling.
    """

    mini_batch_size: int | None = None
    epochs: int = 1
    micro_batch_tokens: int = 16384
    inference_tokens: int = 32768
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mini_batch_size", "epochs", "micro_batch_tokens", "inference_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")


class Learner(Generic[M]):
    """Owns the sharded model, its optimizer and the order in which sequences are visited.

    Every method is collective: all ranks call it.
    """

    def __init__(self, model: M, config: ModelConfig, optim: OptimConfig, update: UpdateConfig, ranks: Ranks) -> None:
        """Shard `model` over `ranks`."""
        shard(model, config, ranks)
        self.model = model
        self._residence = Residence(model, config, ranks)
        self._ranks = ranks
        self._plan = update
        self._optimizer = Optimizer(model, optim, config.optimizer_offload)
        self._shuffler = torch.Generator().manual_seed(update.seed)

    def _infer(self, batch: Batch, forward: Callable[[Batch], Tensor]) -> Tensor:
        """Apply `forward` to this rank's rows, of which each rank may have any number.

        Args:
            batch: this rank's rows.
            forward: from a micro-batch on the device to (rows, columns) float32.

        Returns:
            (B, S) float32 on the CPU, 0 on padding.
        """
        self._residence.wake()
        return infer(self.model, batch, forward, self._plan.inference_tokens, self._ranks)

    def _update(self, batch: Batch, loss: LossFunction, count: Count) -> dict[str, float]:
        """Take one optimizer step per mini-batch.

        Args:
            batch: the whole batch, the same on every rank: mini-batches, each rank's share of them and the
                normaliser follow from it, so neither the number of ranks nor the micro-batches change the result.
            loss: see `LossFunction`.
            count: what the loss is normalised by.

        Returns:
            Averages over the optimizer steps of the loss's terms, its means and `grad_norm`; `lr`; `updates`, the
            steps taken; and `skipped_updates`, whose loss or gradient was not finite and which changed nothing.
        """
        self._residence.wake()
        self.model.train()
        lengths = batch.lengths.tolist()
        applied: list[dict[str, float]] = []
        planned = 0
        generator = self._shuffler if self._plan.shuffle else None
        for rows in mini_batches(batch, self._plan.mini_batch_size, self._plan.epochs, generator):
            planned += 1
            normalizer = count(batch.action_mask[rows]).to(torch.float32) / self._ranks.size
            stats = self._mini_batch(batch, lengths, rows, loss, normalizer.to(self._ranks.device))
            if stats is not None:
                applied.append(stats)
        averages = {name: sum(stats[name] for stats in applied) / len(applied) for name in (applied or [{}])[0]}
        counts = {"lr": self._optimizer.lr, "updates": len(applied), "skipped_updates": planned - len(applied)}
        self._optimizer.end_training_step()
        return averages | {name: float(value) for name, value in counts.items()}

    def _mini_batch(
        self, batch: Batch, lengths: list[int], rows: list[int], loss: LossFunction, normalizer: Tensor
    ) -> dict[str, float] | None:
        """Take one optimizer step and return its stats, or None if the loss or the gradient was not finite."""
        budget = self._plan.micro_batch_tokens
        sums = _Sums(self._ranks)
        for group in rank_micro_batches(lengths, rows, self._ranks.rank, self._ranks.size, budget):
            output = loss(take(batch, group, self._ranks.device), normalizer)
            output.loss.backward()
            sums.add(output)
        loss_sum, stats = sums.reduce()
        norm = self._optimizer.gradient_norm()
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            self._optimizer.step(norm)
        self._optimizer.zero_grad()
        return stats | {"grad_norm": norm} if finite else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors of model, optimizer, schedule and shuffling by name (sharded ones as DTensors).

        `torch.distributed.checkpoint` saves them, and loads into them, on any number of ranks.
        """
        to_shards(self.model)
        state = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        state |= {f"optimizer.{name}": value for name, value in self._optimizer.state_dict().items()}
        return state | {"shuffler": self._shuffler.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is the state of another model.
        """
        copy_tensors(self.state_dict(), state)
        self._shuffler.set_state(state["shuffler"].cpu())

    def sleep(self) -> None:
        """Send parameters and optimizer state to the CPU, to leave the GPU to the rollout engine.

        The next inference, update or gathering of weights fetches what it needs.
        """
        self._residence.sleep()
        self._optimizer.offload()

    def wake(self) -> None:
        """Bring the parameters back after `sleep`."""
        self._residence.wake()


class _Sums:
    """Adds up the outputs of micro-batches, then of ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._terms: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}

    def add(self, output: LossOutput) -> None:
        """Add one micro-batch."""
        for name, value in ({"loss": output.loss} | dict(output.terms)).items():
            self._terms[name] = self._terms.get(name, 0.0) + value.detach().double()
        for name, (mean, count) in output.means.items():
            # A mean over nothing is 0, whatever it is called; NaN must not come in through the back door.
            pair = torch.stack((torch.where(count > 0, mean.detach(), 0).double() * count, count.double()))
            self._means[name] = self._means.get(name, 0.0) + pair

    def reduce(self) -> tuple[float, dict[str, float]]:
        """Return the mini-batch's loss and its stats; every rank must call it."""
        flat = torch.cat([torch.stack(list(self._terms.values())), *self._means.values()])
        total = self._ranks.total(flat).tolist()
        terms = dict(zip(self._terms, (value / self._ranks.size for value in total), strict=False))
        pairs = iter(total[len(self._terms) :])
        means = {name: value / max(count, 1.0) for name, value, count in zip(self._means, pairs, pairs, strict=True)}
        return terms.pop("loss"), terms | means


@torch.no_grad()
def infer(
    model: LogProbModel | ValueModel, batch: Batch, forward: Callable[[Batch], Tensor], budget: int, ranks: Ranks
) -> Tensor:
    """Apply `forward` to the rows of `batch` in micro-batches of at most `budget` tokens; see `Learner._infer`."""
    model.eval()
    result = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
    groups = pack_rows(batch.lengths.tolist(), budget)
    for rows in padded(groups, ranks.largest(len(groups))):
        values = forward(take(batch, rows, ranks.device))
        if rows:
            result[torch.tensor(rows), : values.shape[1]] = values.cpu()
    to_shards(model)
    return result
