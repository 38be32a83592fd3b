#!/usr/bin/env bash
# Zero-shot: the generator answers without documents, directly. Nothing has to run; scripts/evaluation/run.sh asks it so.
# Usage: [QUESTIONS=FILE] [OUTPUT=FOLDER] bash scripts/baselines/zeroshot.sh [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
own=()
if [[ $* != *setting=* ]]; then
  own+=("questions=${QUESTIONS:-data/nq_hotpotqa_train/test_e5_s3_sampled.parquet}")
elif [[ -n ${QUESTIONS:-} ]]; then
  own+=("questions=$QUESTIONS")
fi
exec "$PYTHON" -m verl.evaluation.collect method=direct output="${OUTPUT:-outputs/contexts/zero_shot}" \
  ${own[@]+"${own[@]}"} "$@"
