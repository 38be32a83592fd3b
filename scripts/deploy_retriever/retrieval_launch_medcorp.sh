#!/usr/bin/env bash
# Serve the dense index (e5) of MedCorp on port 3000.
#   bash scripts/deploy_retriever/retrieval_launch_medcorp.sh [--topk 8 ...]
# INDEX_PATH and CORPUS_PATH say where they are, if not at indexes/medcorp_e5 and data/medcorp.jsonl.
set -euo pipefail
export INDEX_PATH="${INDEX_PATH:-indexes/medcorp_e5}" CORPUS_PATH="${CORPUS_PATH:-data/medcorp.jsonl}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/retrieval_launch.sh" "$@"
