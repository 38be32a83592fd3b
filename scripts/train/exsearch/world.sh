#!/usr/bin/env bash
# ExSearch on the embedded world: builds it, serves its BM25, warms up, three iterations of EM, report. On a CPU, offline.
# Usage: bash scripts/train/exsearch/world.sh [key=value ...], for example: seed=1 output=outputs/exsearch_world_1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../env.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" -m verl.trainer.main_self_train self_train_recipe=exsearch_world "$@"
