#!/usr/bin/env bash
# Train s3 as published: PPO, Qwen2.5-7B-Instruct-1M, 8-3-3, five GPUs.
# Needs: retriever on :3000 (scripts/deploy_retriever/retrieval_launch.sh), generator on :8000 (generator_llms/host.sh),
# and the precomputed training parquet (scripts/precompute.sh).
# Usage: bash scripts/train/train_s3.sh [SEED] [key=value ...]; --cfg job prints the composed configuration and stops.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
seed=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=("trainer.seed=$1" "data.seed=$1")
  shift
fi
exec "$PYTHON" -m verl.trainer.main_ppo recipe=s3_8_3_3 trainer.folder=outputs/s3_8_3_3 ${seed[@]+"${seed[@]}"} "$@"
