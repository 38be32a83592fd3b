"""Where metrics go: always a jsonl file and the console, and wandb or tensorboard when the config says so."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from verl.errors import ConfigError

logger = logging.getLogger(__name__)


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
                raise ConfigError(f"tracking.backends names {backend!r}; known: {', '.join(sorted(_BACKENDS))}")


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
    write again, are dropped from the history.
    """

    def __init__(
        self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], resume_step: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.history = read_history(folder / "metrics.jsonl", resume_step)
        self._config = config
        self._sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", self.history)]
        self._sinks += [_BACKENDS[name](folder, config, run_config) for name in config.backends]

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
    "timing_s/step": "s",
}


def console_line(metrics: Mapping[str, float], step: int) -> str:
    """Return the step's headline figures in one line."""
    shown = [f"{label} {metrics[key]:.3g}" for key, label in CONSOLE_KEYS.items() if key in metrics]
    return f"step {step}: " + ", ".join(shown)


def read_history(path: Path, last_step: int) -> list[dict[str, float]]:
    """Return the rows of a metrics file up to `last_step`; none when nothing is resumed."""
    return [row for row in read_all(path) if row["step"] <= last_step] if last_step > 0 else []


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
        self._stream: IO[str] = path.open("w", encoding="utf-8")
        for row in history:
            self._write(row)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **metrics})

    def close(self) -> None:
        self._stream.close()

    def _write(self, row: Mapping[str, float]) -> None:
        clean = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._stream.write(json.dumps(clean) + "\n")
        self._stream.flush()


class WandbSink:
    """Weights & Biases; imported only when it is asked for."""

    def __init__(self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any]) -> None:
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

    def __init__(self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", json.dumps(run_config, default=str))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


_BACKENDS = {"wandb": WandbSink, "tensorboard": TensorboardSink}
