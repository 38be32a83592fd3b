#!/usr/bin/env bash
# Install if needed, then run the whole pipeline on the embedded world; a second run reuses what is built.
# Usage: bash scripts/quickstart.sh [key=value ...], for example: world.test=100 train.engine.kind=hf output=outputs/try
# All keys: .venv/bin/python -m verl.trainer.quickstart --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh

# One thread each: the policy engine and the generator share a small machine. Nothing is looked up on the network.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
export VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
exec .venv/bin/python -m verl.trainer.quickstart "$@"
