#!/usr/bin/env bash
# Serve a dense index (e5) on port 3000.
#   INDEX_PATH=indexes/e5 CORPUS_PATH=data/wiki-18.jsonl bash scripts/deploy_retriever/retrieval_launch.sh [--topk 8 ...]
# INDEX_PATH may also be the published flat index, for example data/e5_Flat.index.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

: "${INDEX_PATH:?set it to the folder that verl.retrieval.build wrote, or to a published index file}"
: "${CORPUS_PATH:?set it to the corpus that the index was built from}"

exec "$PYTHON" -m verl.retrieval.server \
  --index_path "$INDEX_PATH" \
  --corpus_path "$CORPUS_PATH" \
  --retriever_name "${RETRIEVER_NAME:-e5}" \
  --topk "${TOPK:-12}" \
  --port "${PORT:-3000}" \
  "$@"
