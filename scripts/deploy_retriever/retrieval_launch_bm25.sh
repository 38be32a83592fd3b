#!/usr/bin/env bash
# Serve a BM25 index on port 4000. RETRIEVER_NAME=lucene serves a Lucene one, such as the published one of wiki-18.
#   INDEX_PATH=indexes/bm25 CORPUS_PATH=data/wiki-18.jsonl \
#     bash scripts/deploy_retriever/retrieval_launch_bm25.sh [--topk 8 ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

: "${INDEX_PATH:?set it to the folder that verl.retrieval.build wrote}"
: "${CORPUS_PATH:?set it to the corpus that the index was built from}"

exec "$PYTHON" -m verl.retrieval.server \
  --index_path "$INDEX_PATH" \
  --corpus_path "$CORPUS_PATH" \
  --retriever_name "${RETRIEVER_NAME:-bm25}" \
  --topk "${TOPK:-12}" \
  --port "${PORT:-4000}" \
  "$@"
