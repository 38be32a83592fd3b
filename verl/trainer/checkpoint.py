"""Checkpoints that are whole or not there.

A checkpoint is a folder `step_000020` with the learners' shards (`torch.distributed.checkpoint`, so it loads on another
number of processes), the driver's state, and a Hugging Face export that vLLM serves. It is written under a temporary
name and renamed when everything is on disk, so a kill at any moment leaves the previous one.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.errors import CheckpointError

logger = logging.getLogger(__name__)

DRIVER = "driver.json"
LEARNERS = "learners"
EXPORT = "hf"
_NAME = re.compile(r"step_(\d{6,})")
Write = Callable[[Path], None]


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
        save_freq: save every so many steps, and always after the last one; 0 saves only after the last.
        keep: newest checkpoints that stay.
        keep_steps: steps that are saved too, and stay, for other runs to start from.
        best_metric: validation metric; of the checkpoints of validated steps the one with the highest stays too. Null
            keeps none for that.
        export_hf: also write each checkpoint in Hugging Face format.
    """

    save_freq: int = 50
    keep: int = 2
    keep_steps: tuple[int, ...] = ()
    best_metric: str | None = "val/accuracy"
    export_hf: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}; expected at least 1, or nothing could be resumed")
        if self.save_freq < 0:
            raise ValueError(f"save_freq={self.save_freq}; expected 0 or more")
        if any(step < 1 for step in self.keep_steps):
            raise ValueError(f"keep_steps={list(self.keep_steps)}; expected steps from 1")

    def due(self, step: int) -> bool:
        """Whether `step` is saved, wherever the run ends."""
        return step in self.keep_steps or (self.save_freq > 0 and step % self.save_freq == 0)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    driver: Mapping[str, Any]

    @property
    def learners(self) -> Path:
        """Folder of the learners' shards."""
        return self.path / LEARNERS

    @property
    def export(self) -> Path:
        """Folder of the Hugging Face export."""
        return self.path / EXPORT


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        # Absolute, because workers that write here may have started in another directory.
        self._folder = folder.absolute()
        self._config = config

    def save(
        self, step: int, driver: Mapping[str, Any], write_learners: Write, write_export: Write | None = None
    ) -> Checkpoint:
        """Write the checkpoint of `step`, then drop those that need not stay.

        Args:
            driver: JSON-safe state of the driver; the value of `best_metric`, if it was measured, under `"best"`.
            write_learners: writes all ranks' shards into the given folder.
            write_export: writes the Hugging Face export into the given folder.

        Raises:
            CheckpointError: the disk refused; the previous checkpoints are untouched.
        """
        target = self._folder / f"step_{step:06d}"
        partial = self._folder / f".{target.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_learners(partial / LEARNERS)
            if write_export is not None and self._config.export_hf:
                write_export(partial / EXPORT)
            _write_synced(partial / DRIVER, json.dumps({"step": step, **driver}))
            _sync_tree(partial)
            self._drop(target)
            os.replace(partial, target)
            _sync(self._folder)
        except OSError as cause:
            raise CheckpointError(f"checkpoint {target} could not be written ({cause}); free some space") from cause
        logger.info("saved %s", target)
        self._drop_old()
        return load(target)

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None; incomplete ones are passed over."""
        for path in reversed(self._paths()):
            try:
                return load(path)
            except CheckpointError as error:
                logger.warning("%s; trying an earlier one", error)
        return None

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the highest recorded metric (the earliest of equals), or None."""
        rated = [c for c in map(_load_or_none, self._paths()) if c and _is_number(c.driver.get("best"))]
        return max(rated, key=lambda c: (c.driver["best"], -c.step), default=None)

    def begin(self, resume: str) -> Checkpoint | None:
        """Return where a run starts (see `find`), and set aside the checkpoints that are not of its past.

        Else a run that starts anew, or further back, would take them for its own latest ones.

        Raises:
            CheckpointError: as `find`.
        """
        start = find(resume, self)
        ours = start is not None and start.path.resolve().parent == self._folder.resolve()
        later = [path for path in self._paths() if not ours or _step_of(path) > start.step]
        if later:
            aside = free_name(self._folder)
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
            logger.warning("%d checkpoints that this run does not continue are now in %s", len(later), aside)
        return start

    def _paths(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted((path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)

    def _drop_old(self) -> None:
        best = self.best() if self._config.best_metric else None
        for path in self._paths()[: -self._config.keep]:
            if _step_of(path) not in self._config.keep_steps and (best is None or path != best.path):
                self._drop(path)

    def _drop(self, path: Path) -> None:
        """Delete a checkpoint; under another name first, so that a kill half-way leaves none that looks whole."""
        dropped = self._folder / f".{path.name}.dropped"
        shutil.rmtree(dropped, ignore_errors=True)
        if path.exists():
            path.rename(dropped)
            shutil.rmtree(dropped)


def load(path: Path) -> Checkpoint:
    """Open a checkpoint folder.

    Raises:
        CheckpointError: it is missing or incomplete.
    """
    try:
        driver = json.loads((path / DRIVER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path} is no complete checkpoint ({cause}); expected a folder step_NNNNNN") from cause
    if not isinstance(driver, dict) or not isinstance(driver.get("step"), int) or not (path / LEARNERS).is_dir():
        raise CheckpointError(
            f"{path} is no complete checkpoint ({DRIVER} states no step, or there is no {LEARNERS}/); expected a "
            "folder step_NNNNNN as the trainer writes it"
        )
    return Checkpoint(path, driver["step"], driver)


def find(resume: str, checkpoints: Checkpoints) -> Checkpoint | None:
    """Return what `trainer.resume` asks for: `auto` the latest if any, `never` None, else the folder of that path.

    Raises:
        CheckpointError: a path that holds no complete checkpoint.
    """
    if resume == "never":
        return None
    return checkpoints.latest() if resume == "auto" else load(Path(resume))


def free_name(path: Path) -> Path:
    """Return the first of `name.1`, `name.2`, ... beside `path` that is not taken; a file keeps its suffix last."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _load_or_none(path: Path) -> Checkpoint | None:
    try:
        return load(path)
    except CheckpointError:
        return None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below, so that the rename cannot overtake their content."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
