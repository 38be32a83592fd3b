#!/usr/bin/env bash
# Naive RAG: the question is the query. Needs: a retriever (URL, default the dense one on :3000).
# Usage: [URL=http://127.0.0.1:4000/retrieve] [OUTPUT=FOLDER] bash scripts/baselines/rag.sh [topk=12] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
own=()
if [[ $* != *setting=* ]]; then
  own+=("questions=${QUESTIONS:-data/nq_hotpotqa_train/test_e5_s3_sampled.parquet}")
elif [[ -n ${QUESTIONS:-} ]]; then
  own+=("questions=$QUESTIONS")
fi
exec "$PYTHON" -m verl.evaluation.collect method=naive_rag output="${OUTPUT:-outputs/contexts/naive_rag}" \
  topk=12 retriever.url="${URL:-http://127.0.0.1:3000/retrieve}" ${own[@]+"${own[@]}"} "$@"
