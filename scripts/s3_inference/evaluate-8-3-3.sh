#!/usr/bin/env bash
# Gather contexts for the test questions with a trained s3 searcher, 8-3-3: top-k 8, at most 3 selected, T = 3, greedy.
# Needs: the retriever on :3000 and a checkpoint in Hugging Face format, which MODEL names (default: the training's last).
# Usage: MODEL=FOLDER bash scripts/s3_inference/evaluate-8-3-3.sh [SEED] [key=value ...]; --cfg job prints the composed configuration and stops.
set -euo pipefail
source "$(dirname "$0")/../env.sh"
seed=42
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=$1
  shift
fi
exec "$PYTHON" -m verl.evaluation.collect method=searcher \
  questions="${QUESTIONS:-data/nq_hotpotqa_train/test_e5_s3_sampled.parquet}" \
  output="${OUTPUT:-outputs/contexts/s3_8-3-3}" \
  engine.model="${MODEL:-outputs/s3_8_3_3/checkpoints/step_000020/hf}" \
  search.topk=8 search.max_selected=3 search.max_turns=3 sampling.seed="$seed" \
  retriever.url=http://127.0.0.1:3000/retrieve \
  "$@"
