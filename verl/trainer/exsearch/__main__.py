"""Run one stage of self-training alone, from its files to its files.

    python -m verl.trainer.exsearch STAGE self_train_recipe=exsearch policy=CHECKPOINT epoch=1 train=... output=...

| stage | published as | reads | writes |
|---|---|---|---|
| `sft` | `sft` | `warmup` | `{output}/sft/model` |
| `inference` | `inference` | `train`, the retriever | trajectories and the inference file |
| `entropy` | `entropy` | trajectories | the entropy file |
| `format` | `formate` | both | the training file and the token rows |
| `align` | `align` | the token rows | `{output}/epo{e}/align/model` |
| `evaluate` | | `dev`, `test`, the retriever | `{output}/evaluation/{policy}` |

`policy` is the model that the stage is about, and for `align` the one that it begins with; the files are those of
`verl.trainer.exsearch.files`, so a stage can be repeated inside the folder of a whole run. The stage may also be given
by the environment variable PROCEDURE.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl.config import run_entry
from verl.errors import ConfigError
from verl.trainer.exsearch.config import SelfTrainConfig
from verl.trainer.exsearch.policy import Player
from verl.trainer.exsearch.stages import Stage, label_of, warm_up
from verl.typed import nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageConfig(SelfTrainConfig):
    """One stage of self-training.

    Attributes:
        epoch: the iteration, from 1.
    """

    epoch: int = 1

    def __post_init__(self) -> None:
        SelfTrainConfig.__post_init__(self)
        if self.epoch < 1:
            raise ValueError(f"epoch={self.epoch}; iterations are counted from 1")


def _sft(config: StageConfig, stage: Stage) -> dict[str, Any]:
    if config.warmup is None:
        raise ConfigError("warmup is not set; give a file of trajectories, see data_preprocess.warmup")
    return warm_up(config, config.output / "sft", config.warmup)


def _evaluate(config: StageConfig, stage: Stage) -> dict[str, Any]:
    sets = {name: path for name, path in (("dev", config.dev), ("test", config.test)) if path is not None}
    if not sets:
        raise ConfigError("neither dev nor test is set; give a parquet of questions")
    return {name: stage.evaluate(label_of(config.policy), path, name) for name, path in sets.items()}


STAGES: dict[str, Callable[[StageConfig, Stage], dict[str, Any]]] = {
    "sft": _sft,
    "inference": lambda config, stage: stage.inference(),
    "entropy": lambda config, stage: stage.entropy(),
    "format": lambda config, stage: stage.format(),
    "formate": lambda config, stage: stage.format(),
    "align": lambda config, stage: stage.align(config.policy),
    "evaluate": _evaluate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    name = (
        argv.pop(0) if argv and "=" not in argv[0] and not argv[0].startswith("-") else os.environ.get("PROCEDURE", "")
    )
    if name not in STAGES:
        hint = f"; did you mean {nearest(name, list(STAGES))!r}?" if name else ""
        sys.stderr.write(f"error: stage {name!r}{hint} Stages: {', '.join(STAGES)}\n")
        return 2

    def run(config: StageConfig) -> None:
        with Player(config.engine, config.retriever, config.keep_engine) as player:
            found = STAGES[name](config, Stage(config, player, config.epoch, config.policy))
        sys.stdout.write(json.dumps(found, indent=1) + "\n")

    return run_entry("self_train", StageConfig, argv, run)


if __name__ == "__main__":
    raise SystemExit(main())
