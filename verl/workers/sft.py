"""Supervised fine-tuning over the ranks: the model's negative log-likelihoods, weighted token by token.

Legend: B rows, S tokens. A row holds one sequence or several; `position_ids` start again at 0 with each, and no token
sees another sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from verl.batch import WeightedBatch
from verl.workers.checkpoint import load, save
from verl.workers.export import export_causal_lm, full_weights
from verl.workers.heads import LogProbModel
from verl.workers.learner import Learner, LossOutput, UpdateConfig
from verl.workers.lora import LoraConfig, LoraLinear, add_adapters, merged
from verl.workers.model import ModelConfig, load_causal_lm
from verl.workers.optim import OptimConfig
from verl.workers.ranks import Device, Ranks, join_ranks

_RENAMED = {"weighted_nll": "loss"}  # the learner keeps the name `loss` for itself


class NllModel(LogProbModel):
    """A causal language model that returns negative log-likelihoods, of packed rows too."""

    def forward(self, input_ids: Tensor, mask: Tensor, position_ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return (B, S) float32: the negative log-likelihood of the masked tokens, 0 elsewhere.

        Args:
            input_ids: (B, S) int64, right-padded.
            mask: (B, S) bool, the tokens to speak of; position 0 of a sequence cannot be one of them.
            position_ids: (B, S) int64 of packed rows. None where each row is one sequence, which allows the fastest
                attention kernels.
        """
        # Without a mask, transformers keeps sequences apart wherever the positions do not go on by one.
        hidden = self.causal_lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        losses = self._nll(hidden[:, :-1][mask[:, 1:]], input_ids[:, 1:][mask[:, 1:]])
        return torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device).masked_scatter(mask, losses)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of (N, H) states against (N,) targets chunk by chunk."""
        pairs = zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        if not torch.is_grad_enabled() or len(targets) <= self.chunk_tokens:
            return torch.cat([self._chunk(*pair) for pair in pairs])
        # Without it, autograd would keep every chunk's logits, which is all of them.
        return torch.cat([checkpoint(self._chunk, *pair, use_reentrant=False) for pair in pairs])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.causal_lm.get_output_embeddings()(hidden).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class SftWorkerConfig:
    """What a process of supervised fine-tuning hosts.

    Attributes:
        update: `mini_batch_size` and `epochs` stay as they are: a batch is one optimizer step.
        lora: null trains every parameter.
        threads: of torch in this process; null leaves them as they are.
        seed: of torch's generators; each rank adds its number.
    """

    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    lora: LoraConfig | None = None
    device: Device = "cpu"
    threads: int | None = None
    seed: int = 0


class SftLearner(Learner[NllModel]):
    """The model that is tuned; every method is collective, so all ranks call it."""

    def __init__(self, config: SftWorkerConfig, ranks: Ranks) -> None:
        """Load the model, with adapters if there are to be any, and shard it.

        Raises:
            ConfigError: the model does not load or is not supported.
        """
        plain = load_causal_lm(config.model)
        if config.lora is not None:
            add_adapters(plain.causal_lm, config.lora)
        model = NllModel(plain.causal_lm, config.model.logits_chunk)
        names = (name for name, module in plain.causal_lm.named_modules() if isinstance(module, LoraLinear))
        self._adapted = frozenset(names)
        self._config = config
        super().__init__(model, config.model, config.optim, config.update, ranks)

    def update(self, batch: WeightedBatch) -> dict[str, float]:
        """Take one optimizer step on the sum of token weight times negative log-likelihood.

        Args:
            batch: the whole batch, the same on every rank.

        Returns:
            `loss`, the mean `nll` of the learned tokens, and the rest of `Learner._update`, prefixed with `sft/`.
        """

        def loss(micro: WeightedBatch, normalizer: Tensor) -> LossOutput:
            nll = self._nll(micro)
            share = (micro.token_weights * nll).sum() / normalizer
            learned = micro.action_mask.sum()
            return LossOutput(share, {"weighted_nll": share}, {"nll": (nll.sum() / learned.clamp(min=1), learned)})

        # The weights are normalised already; what is left is the average over ranks.
        stats = self._update(batch, loss, lambda mask: torch.ones(()))
        return {f"sft/{_RENAMED.get(name, name)}": value for name, value in stats.items()}

    def nll(self, batch: WeightedBatch) -> Tensor:
        """Return (B, S) float32 negative log-likelihoods of the learned tokens of this rank's rows, 0 elsewhere."""
        return self._infer(batch, self._nll)

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        """Write a folder that transformers and vLLM load, adapters merged into the weights; rank 0 writes."""
        self.wake()
        dtype = self._config.model.compute_dtype
        if self._config.lora is None:
            weights = full_weights(self.model, dtype)
        else:
            weights = merged(full_weights(self.model, torch.float32), self._adapted, self._config.lora, dtype)
        export_causal_lm(self.model.causal_lm, weights, folder, tokenizer_path, self._ranks.rank == 0)

    def _nll(self, micro: Any) -> Tensor:
        packed = bool((micro.position_ids[:, 1:] != micro.position_ids[:, :-1] + 1)[micro.attention_mask[:, 1:]].any())
        return self.model(micro.input_ids, micro.action_mask, micro.position_ids if packed else None)


class SftWorker:
    """One process per device. Every method is collective: all workers of the group are called."""

    def __init__(self, config: SftWorkerConfig) -> None:
        """Join the process group and load the model.

        Raises:
            ConfigError: the model does not load, the device is not there, or the rendezvous is not described.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._ranks = join_ranks(config.device)
        torch.manual_seed(config.seed + self._ranks.rank)
        self._learner = SftLearner(config, self._ranks)

    def update(self, batch: WeightedBatch) -> dict[str, float]:
        """See `SftLearner.update`; each worker gets the whole batch (call) and answers the same stats."""
        return self._learner.update(batch)

    def nll(self, batch: WeightedBatch) -> Tensor:
        """See `SftLearner.nll`; each worker gets rows of its own (dispatch)."""
        return self._learner.nll(batch)

    def save_checkpoint(self, folder: Path) -> None:
        """Write model, optimizer, schedule and random generators into `folder`.

        Raises:
            CheckpointError: it could not be written.
        """
        save(folder, {"sft": self._learner}, self._ranks)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote on any number of workers.

        Raises:
            CheckpointError: there is no whole checkpoint, or it is of another model.
        """
        load(folder, {"sft": self._learner}, self._ranks)

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        """See `SftLearner.export_hf`."""
        self._learner.export_hf(folder, tokenizer_path)
        # No worker goes on to read what another still writes.
        dist.barrier()
