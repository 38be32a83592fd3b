#!/usr/bin/env bash
# One stage of ExSearch's self-training alone: entropy. See verl/trainer/exsearch/__main__.py for its files.
# Usage: bash scripts/train/exsearch/entropy.sh self_train_recipe=exsearch policy=CHECKPOINT epoch=1 train=... output=... [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../env.sh"
exec "$PYTHON" -m verl.trainer.exsearch entropy "$@"
