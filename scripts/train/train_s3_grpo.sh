#!/usr/bin/env bash
# Train s3 with GRPO on four GPUs.
# Needs: retriever on :3000 (scripts/deploy_retriever/retrieval_launch.sh), generator on :8000 (generator_llms/host.sh),
# and the precomputed training parquet (scripts/precompute.sh).
# Usage: bash scripts/train/train_s3_grpo.sh [SEED] [key=value ...]; --cfg job prints the composed configuration and stops.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
seed=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=("trainer.seed=$1" "data.seed=$1")
  shift
fi
exec "$PYTHON" -m verl.trainer.main_ppo recipe=s3_grpo trainer.folder=outputs/s3_grpo ${seed[@]+"${seed[@]}"} "$@"
