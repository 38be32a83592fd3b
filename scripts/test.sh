#!/usr/bin/env bash
# Install if needed, then run the tests; arguments go to pytest. Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
exec .venv/bin/python -m pytest "$@"
