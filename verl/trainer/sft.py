"""Supervised fine-tuning on weighted examples: the run around `verl.workers.sft`.

One device is trained on in this process, several in Ray workers. `run_sft` may be called any number of times.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from verl.batch import WeightedBatch
from verl.config import to_dict, to_yaml
from verl.errors import CheckpointError, ConfigError, DataError
from verl.evaluation.journal import write_whole
from verl.single_controller.cluster import cluster
from verl.single_controller.placement import ResourcePool
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.checkpoint import Checkpoint, Checkpoints
from verl.trainer.sft_batch import collate, rows_of, step_examples, steps_per_epoch
from verl.trainer.sft_config import SftConfig
from verl.trainer.sft_data import Fitted, SftExample, fit, read_examples
from verl.trainer.sft_report import write_sft_report
from verl.trainer.tracking import Tracker
from verl.workers.learner import UpdateConfig
from verl.workers.sft import SftWorker, SftWorkerConfig

logger = logging.getLogger(__name__)

MODEL = "model"


@dataclass(frozen=True)
class SftSummary:
    """What a finished run was.

    Attributes:
        model: folder in Hugging Face format.
        steps: optimizer steps, the skipped ones included.
        tokens: tokens of the sequences that were trained on, each time they were.
        seconds: wall-clock of the steps.
        loss: of the last step.
        validation: figures of the last validation, `loss` and `nll`; empty without validation data.
        examples: of one epoch.
        dropped: examples that were left out, by reason.
        cut: examples that lost their end.
        skipped_updates: steps whose loss or gradient was not finite, which changed nothing.
    """

    model: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    validation: Mapping[str, float]
    examples: int
    dropped: Mapping[str, int]
    cut: int
    skipped_updates: int


class SftWorkers(Protocol):
    """What trains: all ranks as one."""

    def update(self, batch: WeightedBatch) -> Mapping[str, float]:
        """Take one optimizer step."""
        ...

    def nll(self, batch: WeightedBatch) -> Tensor:
        """Return the (B, S) losses of the learned tokens."""
        ...

    def save_checkpoint(self, folder: Path) -> None:
        """Write the shards."""
        ...

    def load_checkpoint(self, folder: Path) -> None:
        """Read them."""
        ...

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        """Write the model in Hugging Face format."""
        ...


@dataclass(frozen=True)
class RaySftWorkers:
    """`SftWorkers` as a group of Ray workers."""

    group: WorkerGroup

    def update(self, batch: WeightedBatch) -> Mapping[str, float]:
        return self.group.call("update", batch)[0]

    def nll(self, batch: WeightedBatch) -> Tensor:
        return self.group.dispatch("nll", batch)

    def save_checkpoint(self, folder: Path) -> None:
        self.group.call("save_checkpoint", folder)

    def load_checkpoint(self, folder: Path) -> None:
        self.group.call("load_checkpoint", folder)

    def export_hf(self, folder: Path, tokenizer_path: str) -> None:
        self.group.call("export_hf", folder, tokenizer_path)


def run_sft(config: SftConfig, examples: Sequence[SftExample] | None = None) -> SftSummary:
    """Fine-tune a model and write it to `trainer.folder/model`.

    Args:
        examples: what to learn; `data.train` if None. `data.max_length` and `data.overlong` hold for them too.

    Raises:
        ConfigError, DataError, CheckpointError: found before any training.
        WorkerError: a worker died; the last checkpoint is whole, and the same call goes on from it.
    """
    tokenizer = _tokenizer(config.model.path)
    fitted = _training_data(config, examples, tokenizer)
    held_out = _validation_data(config, tokenizer)
    steps = config.trainer.total_steps or config.trainer.epochs * steps_per_epoch(
        len(fitted.examples), config.batch.size
    )
    checkpoints = Checkpoints(config.trainer.folder / "checkpoints", config.trainer.checkpoint)
    start = checkpoints.begin(config.trainer.resume)
    run = _Run(config, fitted, held_out, steps, checkpoints, start)
    write_whole(config.trainer.folder / "config.yaml", to_yaml(config.recorded()))
    with _workers(config, steps) as workers:
        summary = run.go(workers)
    if config.trainer.report:
        write_sft_report(config.trainer.folder, summary, to_dict(config.recorded()))
    return summary


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"model {path!r} has no tokenizer that loads: {cause}") from cause


def _training_data(
    config: SftConfig, examples: Sequence[SftExample] | None, tokenizer: PreTrainedTokenizerBase
) -> Fitted:
    data = config.data
    if examples is None:
        if data.train is None:
            raise ConfigError("data.train is not set; give a .json, .jsonl or .parquet of training examples")
        examples = read_examples(data.train, tokenizer, data.weighting, data.max_samples)
    fitted = fit(examples, data.max_length, data.overlong)
    dropped = ", ".join(f"{count} {reason}" for reason, count in fitted.dropped.items())
    logger.info("%d examples of %d (%s; %d cut)", len(fitted.examples), len(examples), dropped, fitted.cut)
    if not fitted.examples:
        raise DataError(
            f"none of {len(examples)} examples is left ({dropped}); raise data.max_length={data.max_length}, or set "
            "data.overlong=cut"
        )
    _check_vocabulary(fitted.examples, config.model.path)
    if not any(example.weight > 0 for example in fitted.examples):
        raise DataError(f"all {len(fitted.examples)} examples have weight 0; there is nothing to learn")
    return fitted


def _validation_data(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[SftExample, ...]:
    data = config.data
    if data.validation is None:
        return ()
    fitted = fit(read_examples(data.validation, tokenizer, data.weighting), data.max_length, data.overlong)
    if not fitted.examples:
        raise DataError(f"{data.validation}: no example is left ({dict(fitted.dropped)}); raise data.max_length")
    _check_vocabulary(fitted.examples, config.model.path)
    return fitted.examples


def _check_vocabulary(examples: Sequence[SftExample], path: str) -> None:
    size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    for number, example in enumerate(examples):
        if (largest := max(example.input_ids)) >= size or min(example.input_ids) < 0:
            raise DataError(
                f"example {number} holds token {largest}; {path} has a vocabulary of {size}, so the example was made "
                "with another tokenizer"
            )


@contextmanager
def _workers(config: SftConfig, steps: int) -> Iterator[SftWorkers]:
    """Start what trains: in this process on one device, else in Ray."""
    hardware = config.hardware
    worker = SftWorkerConfig(
        model=config.model,
        optim=config.optim_over(steps),
        update=UpdateConfig(
            # With flash attention sequences are kept apart in a micro-batch of one row only.
            micro_batch_tokens=1 if _one_row(config) else config.batch.micro_tokens,
            inference_tokens=1 if _one_row(config) else config.batch.inference_tokens,
            shuffle=False,
        ),
        lora=config.lora,
        device=hardware.device,
        threads=hardware.threads_per_worker,
        seed=config.trainer.seed,
    )
    if hardware.devices == 1:
        with _alone(hardware.device):
            yield SftWorker(worker)
        return
    with cluster(config.ray, hardware), closing(ResourcePool(hardware)) as resources:
        group = WorkerGroup(SftWorker, (worker,), resources.placed("train"))
        with closing(group):
            yield RaySftWorkers(group)


def _one_row(config: SftConfig) -> bool:
    return config.batch.packing and config.model.attention == "flash_attention_2"


@contextmanager
def _alone(device: str) -> Iterator[None]:
    """Make this process a group of one, and leave its threads and random generators as they were."""
    joined = not dist.is_initialized()
    if joined:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(enabled=True):
            yield
    finally:
        torch.set_num_threads(threads)
        if joined:
            dist.destroy_process_group()


class _Run:
    """One run: its data, where it stands, and what it has counted."""

    def __init__(
        self,
        config: SftConfig,
        fitted: Fitted,
        held_out: tuple[SftExample, ...],
        steps: int,
        checkpoints: Checkpoints,
        start: Checkpoint | None,
    ) -> None:
        """Restore what `start` counted.

        Raises:
            CheckpointError: `start` was trained on other examples.
        """
        self.config, self.fitted, self.held_out, self.steps = config, fitted, held_out, steps
        self.checkpoints, self.start = checkpoints, start
        self.data = _digest(fitted.examples)
        self.totals: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "skipped": 0, "loss": float("nan"), "val": {}}
        if start is not None:
            if start.driver["data"] != self.data or start.driver["batch_size"] != config.batch.size:
                raise CheckpointError(
                    f"{start.path} was trained on other examples or with batch.size={start.driver['batch_size']}; "
                    "restore them, set trainer.resume=never, or choose another trainer.folder"
                )
            self.totals |= start.driver["totals"]

    def go(self, workers: SftWorkers) -> SftSummary:
        """Train to the last step and export the model."""
        folder, done = self.config.trainer.folder, 0
        if self.start is not None:
            logger.info("resuming from %s", self.start.path)
            workers.load_checkpoint(self.start.learners)
            done = self.start.step
        with self._tracker(folder, done) as tracker:
            if done == 0 and self.held_out and self.config.trainer.val_before_train:
                tracker.log(self._validate(workers), 0)
            self._train(done, workers, tracker)
        model = _export(workers, folder / MODEL, self.config.model.path)
        return self._summary(model, max(done, self.steps))

    def _tracker(self, folder: Path, done: int) -> AbstractContextManager[Tracker]:
        return closing(Tracker(folder, self.config.tracking, to_dict(self.config.recorded()), done))

    def _train(self, done: int, workers: SftWorkers, tracker: Tracker) -> None:
        run = self.config.trainer
        with tqdm(total=self.steps, initial=min(done, self.steps), desc="fine-tuning", unit="step") as bar:
            for step in range(done + 1, self.steps + 1):
                metrics = self._step(step, workers)
                last = step == self.steps
                if self.held_out and (last or _due(step, run.test_freq)):
                    metrics |= self._validate(workers)
                tracker.log(metrics, step)
                bar.set_postfix({"loss": f"{self.totals['loss']:.3f}"})
                bar.update()
                if last or _due(step, run.checkpoint.save_freq):
                    self._save(step, workers)

    def _step(self, step: int, workers: SftWorkers) -> dict[str, float]:
        config, began = self.config, time.perf_counter()
        numbers = step_examples(
            len(self.fitted.examples), config.batch.size, step, config.trainer.seed, config.data.shuffle
        )
        examples = [self.fitted.examples[number] for number in numbers]
        metrics = dict(workers.update(self._batch(examples)))
        seconds, tokens = time.perf_counter() - began, sum(len(example.input_ids) for example in examples)
        self.totals["tokens"] += tokens
        self.totals["seconds"] += seconds
        self.totals["skipped"] += int(metrics["sft/skipped_updates"])
        self.totals["loss"] = metrics.get("sft/loss", self.totals["loss"])
        return metrics | {
            "sft/epoch": step / steps_per_epoch(len(self.fitted.examples), config.batch.size),
            "sft/tokens": float(self.totals["tokens"]),
            "sft/mean_weight": sum(example.weight for example in examples) / len(examples),
            "timing_s/step": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }

    def _batch(self, examples: Sequence[SftExample]) -> WeightedBatch:
        config = self.config
        lengths = [len(example.input_ids) for example in examples]
        rows = rows_of(lengths, config.row_tokens, config.hardware.devices, config.batch.packing)
        return collate(examples, rows, config.loss.reduction, config.loss.micro_batch)

    def _validate(self, workers: SftWorkers) -> dict[str, float]:
        """Return the loss over the validation examples as one batch, and the mean over their learned tokens."""
        began, batch = time.perf_counter(), self._batch(self.held_out)
        nll = workers.nll(batch)
        figures = {
            "loss": float((nll.double() * batch.token_weights).sum()),
            "nll": float(nll.double().sum() / batch.action_mask.sum()),
        }
        self.totals["val"] = figures
        return {f"val/{name}": value for name, value in figures.items()} | {"val/seconds": time.perf_counter() - began}

    def _save(self, step: int, workers: SftWorkers) -> None:
        driver = {"data": self.data, "batch_size": self.config.batch.size, "totals": self.totals, "best": None}
        path = self.config.model.path
        self.checkpoints.save(step, driver, workers.save_checkpoint, lambda folder: workers.export_hf(folder, path))

    def _summary(self, model: Path, steps: int) -> SftSummary:
        return SftSummary(
            model=model,
            steps=steps,
            tokens=self.totals["tokens"],
            seconds=self.totals["seconds"],
            loss=self.totals["loss"],
            validation=self.totals["val"],
            examples=len(self.fitted.examples),
            dropped=self.fitted.dropped,
            cut=self.fitted.cut,
            skipped_updates=self.totals["skipped"],
        )


def _export(workers: SftWorkers, folder: Path, tokenizer: str) -> Path:
    """Write the model so that it appears whole or not at all."""
    target = folder.absolute()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    workers.export_hf(partial, tokenizer)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def _digest(examples: Sequence[SftExample]) -> str:
    """Return a digest of the examples and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(np.asarray([len(example.input_ids), *example.input_ids], dtype=np.int64).tobytes())
        digest.update(np.asarray(example.learned, dtype=bool).tobytes())
        digest.update(np.float64(example.weight).tobytes())
    return digest.hexdigest()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
