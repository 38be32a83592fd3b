"""Train a searcher with PPO, GRPO, RLOO or REINFORCE++.

    python -m verl.trainer.main_ppo recipe=s3_8_3_3 data.train=... trainer.folder=...

The retriever and the frozen generator must be running; `--cfg job` prints the composed configuration and stops.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict

from verl.config import run_entry, to_yaml
from verl.errors import SearchAgentError
from verl.evaluation.journal import write_whole
from verl.evaluation.report import plot_curves
from verl.trainer.config import TrainConfig
from verl.trainer.loop import Summary, train
from verl.trainer.tracking import HISTORY, read_all

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> Summary:
    """Train, then draw the curves; the composed configuration is written beside them. Or only validate."""
    if config.trainer.val_only:
        return train(config)
    folder = config.trainer.folder
    write_whole(folder / "config.yaml", to_yaml(config))
    summary = train(config)
    plot_curves(read_all(folder / HISTORY), folder / "report.png")
    logger.info("trained: %s; curves in %s", asdict(summary), folder / "report.png")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    try:
        return run_entry("train", TrainConfig, sys.argv[1:] if argv is None else argv, run)
    except SearchAgentError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
