"""Fine-tune a model on conversations or token sequences, each with a weight.

    python -m verl.trainer.main_sft sft_recipe=exsearch_warmup data.train=... trainer.folder=...

`--cfg job` prints the composed configuration and stops.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from verl.config import run_entry
from verl.trainer.sft import run_sft
from verl.trainer.sft_config import SftConfig

logger = logging.getLogger(__name__)


def run(config: SftConfig) -> None:
    """Train and say where the model is."""
    summary = run_sft(config)
    logger.info(
        "fine-tuned: %d steps, %d tokens in %.1f s, loss %.4f; the model is %s",
        *(summary.steps, summary.tokens, summary.seconds, summary.loss, summary.model),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("sft", SftConfig, sys.argv[1:] if argv is None else argv, run)


if __name__ == "__main__":
    raise SystemExit(main())
