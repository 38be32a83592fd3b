"""Prove that a run which is killed and resumed ends where an unbroken one does, to the bit.

    s3 verify-resume recipe=quickstart data.train=... retriever.url=... generator.base_url=...

Runs N+M steps unbroken; then starts the same run again, kills it with SIGKILL once the checkpoint of step N is there,
resumes it, and compares all that the last checkpoints hold (weights, optimizers, schedules, random generators, the
driver's state) and every logged figure. Both engine and generator get one sequence at a time, because a token may
depend, in the last bit of its probability, on what else is in the batch.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from verl.config import run_entry
from verl.errors import CheckpointError
from verl.trainer.checkpoint import DRIVER, LEARNERS
from verl.trainer.config import TrainConfig
from verl.trainer.tracking import HISTORY, read_all

logger = logging.getLogger(__name__)

DETERMINISTIC = (
    "engine.kind=hf",
    "engine.max_num_seqs=1",
    "generator.concurrency=1",
    "trainer.max_restarts=0",
    "trainer.resume=auto",
    "trainer.checkpoint.export_hf=false",
)
# Wall-clock, and what follows from it, is no part of the result.
_TIMED = (
    *("timing_", "rollout/search_wait", "rollout/reward_wait"),
    *("rollout/tokens_per_second", "rollout/seconds", "val/seconds"),
)
_UNBROKEN, _RESUMED = RUNS = ("unbroken", "resumed")
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Plan:
    """N steps until the kill, M after it.

    Attributes:
        overrides: of the training configuration; services that it names must be running.
        folder: gets both runs.
        before, after: N and M.
        timeout: seconds that one of the three trainings may take.
    """

    overrides: tuple[str, ...]
    folder: Path
    before: int = 2
    after: int = 2
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.before < 1 or self.after < 1:
            raise ValueError(f"before={self.before}, after={self.after}; expected at least 1 step on either side")

    def command(self, name: str) -> list[str]:
        """Return the training command of one of the two runs."""
        return [
            *(sys.executable, "-m", "verl.trainer.main_ppo", *self.overrides, *DETERMINISTIC),
            f"trainer.folder={self.folder / name}",
            f"trainer.total_steps={self.before + self.after}",
            f"trainer.checkpoint.save_freq={self.before}",
        ]

    def checkpoint(self, name: str, step: int) -> Path:
        """Return where a run's checkpoint of `step` is."""
        return self.folder / name / "checkpoints" / f"step_{step:06d}"


def verify(plan: Plan) -> list[str]:
    """Run the comparison; earlier runs in `plan.folder` are deleted.

    Returns:
        The differences, one line each; empty when the runs are equal.

    Raises:
        CheckpointError: a training failed or took too long, or it ended before it could be killed.
    """
    for name in RUNS:
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    _run(plan, _UNBROKEN)
    _run_and_kill(plan, _RESUMED)
    _run(plan, _RESUMED)
    return compare(plan)


def compare(plan: Plan) -> list[str]:
    """Compare the last checkpoints and the metrics of the two runs."""
    last = plan.before + plan.after
    folders = [plan.checkpoint(name, last) for name in RUNS]
    histories = [read_all(plan.folder / name / HISTORY) for name in RUNS]
    return [
        *_tensor_differences(*(_tensors(folder / LEARNERS) for folder in folders)),
        *_driver_differences(*(_driver(folder / DRIVER) for folder in folders)),
        *_metric_differences(*histories),
    ]


def _tensor_differences(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            yield f"{name} is in the {_UNBROKEN if name in mine else _RESUMED} run only"
        elif not torch.equal(mine[name], theirs[name]):
            yield f"{name} differs"


def _driver_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield f"the driver's {name} is {mine.get(name)} against {theirs.get(name)}"


def _metric_differences(mine: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> Iterator[str]:
    if len(mine) != len(theirs):
        yield f"{len(mine)} rows of metrics against {len(theirs)}"
    for row, other in zip(mine, theirs, strict=False):
        for key in sorted(row.keys() | other.keys()):
            if not key.startswith(_TIMED) and not _equal(row.get(key), other.get(key)):
                yield f"step {row['step']:g}: {key} is {row.get(key)} against {other.get(key)}"


def _equal(mine: float | None, theirs: float | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine == theirs or (math.isnan(mine) and math.isnan(theirs))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return everything that the learners saved, put together from all shards."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "learners.pt"
        dcp_to_torch_save(folder, whole)
        return torch.load(whole, weights_only=True)


def _driver(path: Path) -> dict[str, Any]:
    """Return the driver's state without the seconds that it took."""
    state = json.loads(path.read_text(encoding="utf-8"))
    return state | {"totals": {name: value for name, value in state["totals"].items() if name != "seconds"}}


@contextmanager
def _started(plan: Plan, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a training; at the end of the block it is killed if it still runs."""
    with subprocess.Popen(plan.command(name)) as process:
        try:
            yield process
        finally:
            process.kill()


def _run(plan: Plan, name: str) -> None:
    with _started(plan, name) as process:
        try:
            code = process.wait(plan.timeout)
        except subprocess.TimeoutExpired as cause:
            raise CheckpointError(f"the {name} run took more than {plan.timeout:g} s; allow it more") from cause
    if code:
        raise CheckpointError(f"the {name} run ended with exit code {code}; its output says why")


def _run_and_kill(plan: Plan, name: str) -> None:
    """Start a training and kill it without warning once the checkpoint of step N is whole."""
    target = plan.checkpoint(name, plan.before)
    deadline = time.monotonic() + plan.timeout
    with _started(plan, name) as process:
        while not target.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        code = process.poll()
        if code is not None or not target.exists():
            raise CheckpointError(
                f"the run that was to be killed {'still runs' if code is None else f'ended with exit code {code}'}, "
                f"but {target} was expected within {plan.timeout:g} s and before the end; its output says more"
            )
    logger.info("killed the run after %s", target)


def _prove(plan: Plan) -> None:
    differences = verify(plan)
    if differences:
        shown = "\n".join(differences[:50])
        raise CheckpointError(f"{len(differences)} differences between the unbroken and the resumed run:\n{shown}")
    sys.stdout.write(f"{plan.before}+{plan.after} steps, unbroken and killed and resumed, are equal to the bit\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: overrides of the training configuration."""
    overrides = tuple(sys.argv[1:] if argv is None else argv)
    return run_entry(
        "train",
        TrainConfig,
        overrides,
        lambda config: _prove(Plan(overrides, config.trainer.folder / "verify_resume")),
    )


if __name__ == "__main__":
    raise SystemExit(main())
