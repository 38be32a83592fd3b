#!/usr/bin/env bash
# Serve the BM25 index of MedCorp on port 4000.
#   bash scripts/deploy_retriever/retrieval_launch_medcorp_bm25.sh [--topk 8 ...]
# INDEX_PATH and CORPUS_PATH say where they are, if not at indexes/medcorp_bm25 and data/medcorp.jsonl.
set -euo pipefail
export INDEX_PATH="${INDEX_PATH:-indexes/medcorp_bm25}" CORPUS_PATH="${CORPUS_PATH:-data/medcorp.jsonl}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/retrieval_launch_bm25.sh" "$@"
