"""Self-training by generalised EM (ExSearch): a policy teaches itself to search.

    python -m verl.trainer.main_self_train self_train_recipe=exsearch train=... dev=... warmup=... output=...
    python -m verl.trainer.main_self_train self_train_recipe=exsearch_world seed=0        # the embedded world, on a CPU

The retriever must be running, but for the world, which serves its own; `--cfg job` prints the composed configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from verl.config import run_entry
from verl.evaluation.report import plain, stage_table, table
from verl.trainer.exsearch.config import SelfTrainConfig
from verl.trainer.exsearch.outer import self_train


def run(config: SelfTrainConfig) -> None:
    """Run, then print the tables."""
    report = self_train(config)
    sys.stdout.write(f"\n{plain(table(report['methods']))}\n{plain(stage_table(report['stages']))}\n")
    sys.stdout.write(f"{config.output / 'report.json'}, report.md and report.png hold these figures and the curves.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("self_train", SelfTrainConfig, sys.argv[1:] if argv is None else argv, run)


if __name__ == "__main__":
    raise SystemExit(main())
