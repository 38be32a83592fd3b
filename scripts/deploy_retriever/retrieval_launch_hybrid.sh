#!/usr/bin/env bash
# Serve the reciprocal-rank fusion of several indexes of one corpus on port 3000, in place of the dense index.
#   INDEX_PATHS="indexes/bm25 indexes/e5" CORPUS_PATH=data/wiki-18.jsonl \
#     bash scripts/deploy_retriever/retrieval_launch_hybrid.sh [--rrf_k 60 --rerank_model cross-encoder/...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

: "${INDEX_PATHS:?set it to two or more folders that verl.retrieval.build wrote, separated by spaces}"
: "${CORPUS_PATH:?set it to the corpus that the indexes were built from}"
read -ra INDEXES <<<"$INDEX_PATHS"

exec "$PYTHON" -m verl.retrieval.server \
  --retriever_name hybrid \
  --index_path "${INDEXES[@]}" \
  --corpus_path "$CORPUS_PATH" \
  --topk "${TOPK:-12}" \
  --port "${PORT:-3000}" \
  "$@"
