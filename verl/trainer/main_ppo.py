"""Train a searcher with PPO, GRPO, RLOO or REINFORCE++.

    python -m verl.trainer.main_ppo recipe=s3_8_3_3 data.train=... trainer.folder=...

The retriever and the frozen generator must be running; `--cfg job` prints the composed configuration and stops.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict

from verl.config import run_entry
from verl.trainer.config import TrainConfig
from verl.trainer.loop import Summary, train
from verl.trainer.outcome import write_outcome

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> Summary:
    """Train, then write the report with the curves and the composed configuration. Or only validate."""
    if config.trainer.val_only:
        return train(config)
    folder = config.trainer.folder
    summary = train(config)
    write_outcome(config, summary)
    logger.info("trained: %s; report.md, report.json and report.png are in %s", asdict(summary), folder)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("train", TrainConfig, sys.argv[1:] if argv is None else argv, run)


if __name__ == "__main__":
    raise SystemExit(main())
