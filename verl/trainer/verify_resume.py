"""Prove that a run which is killed and resumed ends where an unbroken one does, to the bit.

    s3 verify-resume recipe=quickstart data.train=... retriever.url=... generator.base_url=...

Runs N+M steps unbroken; then starts the same run again, kills it with SIGKILL once the checkpoint of step N is there,
resumes it, and compares every weight and every logged figure of the steps N+1..N+M. Rollouts use the hf engine one
trajectory at a time, because a sampled token may depend, in the last bit, on what else is in the batch.
"""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from verl.config import compose
from verl.errors import CheckpointError
from verl.trainer.checkpoint import EXPORT
from verl.trainer.config import TrainConfig
from verl.trainer.tracking import read_all

logger = logging.getLogger(__name__)

DETERMINISTIC = ("engine.kind=hf", "rollout.in_flight=1", "trainer.max_restarts=0", "trainer.resume=auto")
# Wall-clock, and what follows from it, is no part of the result.
_TIMED = ("timing_s/", "rollout/search_wait", "rollout/reward_wait", "rollout/tokens_per_second")


@dataclass(frozen=True)
class Plan:
    """N steps until the kill, M after it, under `folder`."""

    overrides: tuple[str, ...]
    folder: Path
    before: int = 2
    after: int = 2

    def command(self, name: str) -> list[str]:
        """Return the training command of one of the two runs."""
        return [
            *(sys.executable, "-m", "verl.trainer.main_ppo", *self.overrides, *DETERMINISTIC),
            f"trainer.folder={self.folder / name}",
            f"trainer.total_steps={self.before + self.after}",
            f"trainer.checkpoint.save_freq={self.before}",
            "trainer.checkpoint.export_hf=true",
        ]

    def checkpoint(self, name: str, step: int) -> Path:
        """Return where a run's checkpoint of `step` is."""
        return self.folder / name / "checkpoints" / f"step_{step:06d}"


def verify(plan: Plan, timeout: float = 1800.0) -> list[str]:
    """Run the comparison.

    Returns:
        The differences, one line each; empty when the runs are equal.

    Raises:
        CheckpointError: a run failed or the checkpoint to kill after never came.
    """
    compose("train", list(plan.overrides), TrainConfig)
    for name in ("unbroken", "resumed"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    _run(plan.command("unbroken"), timeout)
    _run_and_kill(plan, timeout)
    _run(plan.command("resumed"), timeout)
    return compare(plan)


def compare(plan: Plan) -> list[str]:
    """Compare the final weights and the metrics of the two runs."""
    last = plan.before + plan.after
    first, second = (
        load_file(plan.checkpoint(name, last) / EXPORT / "model.safetensors") for name in ("unbroken", "resumed")
    )
    differences = [f"weight {name} differs" for name in first if not torch.equal(first[name], second[name])]
    rows = [read_all(plan.folder / name / "metrics.jsonl") for name in ("unbroken", "resumed")]
    if len(rows[0]) != len(rows[1]):
        differences.append(f"{len(rows[0])} rows of metrics against {len(rows[1])}")
    for mine, theirs in zip(*rows, strict=False):
        for key in mine.keys() | theirs.keys():
            if not key.startswith(_TIMED) and not _equal(mine.get(key), theirs.get(key)):
                differences.append(f"step {mine['step']:g}: {key} is {mine.get(key)} against {theirs.get(key)}")
    return differences


def _equal(mine: float | None, theirs: float | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine == theirs or (math.isnan(mine) and math.isnan(theirs))


def _run(command: Sequence[str], timeout: float) -> None:
    done = subprocess.run(command, timeout=timeout, check=False)
    if done.returncode:
        raise CheckpointError(f"a run ended with exit code {done.returncode}; its output says why: {' '.join(command)}")


def _run_and_kill(plan: Plan, timeout: float) -> None:
    """Start the run and kill it without warning once the checkpoint of step N is whole."""
    target = plan.checkpoint("resumed", plan.before)
    process = subprocess.Popen(plan.command("resumed"))
    deadline = time.monotonic() + timeout
    while not target.exists():
        if process.poll() is not None:
            raise CheckpointError(f"the run ended with exit code {process.returncode} before {target} was written")
        if time.monotonic() > deadline:
            process.kill()
            raise CheckpointError(f"{target} did not appear within {timeout:g} s")
        time.sleep(0.05)
    process.kill()
    process.wait()
    logger.info("killed the run after %s", target)


def main(argv: Sequence[str]) -> int:
    """Command line: overrides of the training configuration; prints the verdict."""
    folder = compose("train", list(argv), TrainConfig).trainer.folder / "verify_resume"
    differences = verify(Plan(tuple(argv), folder))
    verdict = "equal to the bit" if not differences else "NOT equal:\n" + "\n".join(differences[:50])
    sys.stdout.write(f"unbroken and resumed runs are {verdict}\n")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
