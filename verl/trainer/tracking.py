"""Where metrics go: always a jsonl file and the console, and wandb or tensorboard when the config says so."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from verl.evaluation.journal import write_whole
from verl.trainer.checkpoint import free_name

logger = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"


@dataclass(frozen=True)
class TrackingConfig:
    """Which trackers to use besides the jsonl file and the console.

    Attributes:
        backends: any of `wandb` and `tensorboard`.
        wandb_mode: wandb's own modes; `offline` needs no account and no network.
        console_every: print the console line every so many steps.
    """

    backends: tuple[str, ...] = ()
    project: str = "s3"
    name: str = "run"
    wandb_mode: str = "offline"
    console_every: int = 1

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in _BACKENDS:
                raise ValueError(f"backends names {backend!r}; known: {', '.join(sorted(_BACKENDS))}")
        if self.console_every < 1:
            raise ValueError(f"console_every={self.console_every}; expected at least 1")


class Sink(Protocol):
    """One tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars of one step."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class Tracker:
    """Sends each step's scalars to every sink; the jsonl history survives a resume.

    On a resume at step `n` pass `resume_step=n`: later rows, which the interrupted run wrote and the resumed one will
    write again, are dropped from the history; None keeps all. A run that starts anew (0) sets an earlier run's file
    aside.
    """

    def __init__(
        self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], resume_step: int | None = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / HISTORY
        self.history = read_history(path, resume_step)
        if not self.history and path.exists() and path.stat().st_size:
            path.rename(free_name(path))
        self._config = config
        self._sinks: list[Sink] = [JsonlSink(path, self.history)]
        self._sinks += [_BACKENDS[name](folder, config, run_config, resume_step) for name in config.backends]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one step's scalars; NaN and infinities go to the file as null and are never averaged away."""
        row = {key: float(value) for key, value in metrics.items()}
        self.history.append({"step": step, **row})
        for sink in self._sinks:
            sink.log(row, step)
        if step % self._config.console_every == 0:
            logger.info("%s", console_line(row, step))

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


CONSOLE_KEYS = {
    "reward/mean": "reward",
    "reward/accuracy": "acc",
    "env/searches": "searches",
    "env/valid_rate": "valid",
    "actor/entropy_loss": "entropy",
    "critic/kl": "kl",
    "actor/grad_norm": "grad",
    "val/accuracy": "val acc",
    "sft/loss": "loss",
    "sft/grad_norm": "grad",
    "val/loss": "val loss",
    "timing_s/step": "s",
}


def console_line(metrics: Mapping[str, float], step: int) -> str:
    """Return the step's headline figures in one line."""
    shown = [f"{label} {metrics[key]:.3g}" for key, label in CONSOLE_KEYS.items() if key in metrics]
    return f"step {step}: " + ", ".join(shown)


def read_history(path: Path, last_step: int | None) -> list[dict[str, float]]:
    """Return the rows of a metrics file up to `last_step`: none for 0, when nothing is resumed, and all for None."""
    if last_step == 0:
        return []
    return [row for row in read_all(path) if last_step is None or row["step"] <= last_step]


def read_all(path: Path) -> list[dict[str, float]]:
    """Return all rows of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


class JsonlSink:
    """One JSON object a step, flushed at once."""

    def __init__(self, path: Path, history: list[dict[str, float]]) -> None:
        # The history is replaced as a whole, so that a kill in between cannot lose it.
        write_whole(path, "".join(map(_line, history)))
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._stream.write(_line({"step": step, **metrics}))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class WandbSink:
    """Weights & Biases; imported only when it is asked for."""

    def __init__(
        self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project, name=config.name, dir=str(folder), mode=config.wandb_mode, config=dict(run_config)
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardSink:
    """Tensorboard event files; imported only when it is asked for."""

    def __init__(
        self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        self._writer.add_text("config", json.dumps(run_config, default=str))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


def _line(row: Mapping[str, float]) -> str:
    return json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n"


_BACKENDS = {"wandb": WandbSink, "tensorboard": TensorboardSink}
