#!/usr/bin/env bash
# Chain of thought: the generator reasons without documents. Nothing has to run; scripts/evaluation/run.sh asks it so.
# Usage: [QUESTIONS=FILE] [OUTPUT=FOLDER] bash scripts/baselines/cot.sh [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
own=()
if [[ $* != *setting=* ]]; then
  own+=("questions=${QUESTIONS:-data/nq_hotpotqa_train/test_e5_s3_sampled.parquet}")
elif [[ -n ${QUESTIONS:-} ]]; then
  own+=("questions=$QUESTIONS")
fi
exec "$PYTHON" -m verl.evaluation.collect method=direct output="${OUTPUT:-outputs/contexts/cot}" \
  ${own[@]+"${own[@]}"} "$@"
