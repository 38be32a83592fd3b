#!/usr/bin/env bash
# Measure naive RAG by BM25, MiniLM and both fused, and a searcher's ceiling, on real multi-hop questions; no generator.
# Needs: DATA, a folder with the sets' published files as configs/multihop.yaml names them. It starts its own services.
# Usage: DATA=FOLDER bash scripts/evaluation/run_multihop.sh [key=value ...]; 'retrievers=[bm25]' takes a minute.
#   OUTPUT    folder of all that is built and of the report (default: outputs/multihop)
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" -m verl.evaluation.multihop folder="${DATA:?name the folder of the published sets}" \
  output="${OUTPUT:-outputs/multihop}" "$@"
