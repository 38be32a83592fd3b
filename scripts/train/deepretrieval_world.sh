#!/usr/bin/env bash
# DeepRetrieval on the embedded world, whole: build and serve the world, train the tiny agent, measure held-out recall.
# Needs nothing running. Usage: bash scripts/train/deepretrieval_world.sh [seed=S] [output=FOLDER] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
export VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
exec "$PYTHON" -m verl.trainer.query_quickstart "$@"
