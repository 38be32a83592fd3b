#!/usr/bin/env bash
# DeepRetrieval's cold start for SQL: fine-tune Qwen2.5-3B-Instruct on explained gold statements (published: learning rate
# 2e-5, batches of 4 a device, 4 epochs; 2 on statements without reasoning). RL goes on from it with model.path=FOLDER.
# Needs: the examples that python -m data_preprocess.sql_cold_start writes.
# Usage: bash scripts/train/deepretrieval_sql_sft.sh [EXAMPLES.jsonl] [key=value ...]; --cfg job prints the configuration.
#   bash scripts/train/deepretrieval_sql_sft.sh data/deepretrieval/spider/cold_start_bare.jsonl trainer.epochs=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
examples=data/deepretrieval/spider/cold_start.jsonl
if [[ ${1:-} == *.jsonl ]]; then
  examples=$1
  shift
fi
exec "$PYTHON" -m verl.trainer.main_sft sft_recipe=deepretrieval_sql data.train="$examples" \
  trainer.folder=outputs/deepretrieval_sql_sft "$@"
