#!/usr/bin/env bash
# Answer the questions of one parquet by naive RAG: writes them with round-0 documents and baseline, and rag_cache.json.
# Needs: retriever on :3000 (scripts/deploy_retriever/), generator on :8000 (generator_llms/host.sh). Killed runs go on.
# Usage: bash scripts/precompute.sh questions=IN.parquet output=OUT.parquet split=train|test [key=value ...]
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m data_preprocess.rag_cache "$@"
