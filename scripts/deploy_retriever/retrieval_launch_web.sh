#!/usr/bin/env bash
# Serve a web search API on port 5000 (3000 is the dense index, 4000 BM25), with every answer kept in a file.
#   SERPER_API_KEY=... bash scripts/deploy_retriever/retrieval_launch_web.sh [--web_rate 5 ...]
# RETRIEVER_NAME is serper (SERPER_API_KEY), serpapi (SERPAPI_API_KEY) or google_cse (GOOGLE_API_KEY, GOOGLE_CSE_ID).
# A run is repeated offline, without a key, with --web_cache_mode replay.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

exec "$PYTHON" -m verl.retrieval.server \
  --retriever_name "${RETRIEVER_NAME:-serper}" \
  --web_cache "${WEB_CACHE:-data/web_answers.sqlite}" \
  --web_cache_mode record \
  --topk "${TOPK:-8}" \
  --port "${PORT:-5000}" \
  "$@"
