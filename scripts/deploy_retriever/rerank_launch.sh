#!/usr/bin/env bash
# Serve a cross-encoder (POST /rerank) on port 6980.
#   bash scripts/deploy_retriever/rerank_launch.sh [--rerank_model cross-encoder/ms-marco-MiniLM-L12-v2 ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

exec "$PYTHON" -m verl.retrieval.rerank_server --port "${PORT:-6980}" "$@"
