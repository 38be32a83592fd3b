#!/usr/bin/env bash
# Train by a recipe of configs/recipe/.
# Needs: retriever on :3000 (scripts/deploy_retriever/retrieval_launch.sh), generator on :8000 (generator_llms/host.sh),
# and the precomputed training parquet (scripts/precompute.sh).
# Usage: bash scripts/train/train.sh RECIPE [SEED] [key=value ...]; --cfg job prints the composed configuration and stops.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
recipe=${1:?name a recipe of configs/recipe, for example s3_8_3_3}
shift
seed=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=("trainer.seed=$1" "data.seed=$1")
  shift
fi
exec "$PYTHON" -m verl.trainer.main_ppo recipe="$recipe" trainer.folder="outputs/$recipe" ${seed[@]+"${seed[@]}"} "$@"
