#!/usr/bin/env bash
# ExSearch as published: warm-up, then E-step, M-step and dev evaluation in turns. The retriever must be running.
# Usage: bash scripts/train/train_exsearch.sh train=QUESTIONS dev=QUESTIONS warmup=ROWS [test=QUESTIONS] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
exec "$PYTHON" -m verl.trainer.main_self_train self_train_recipe=exsearch "$@"
