#!/usr/bin/env bash
# Measure BM25 and MiniLM on real test collections beside independently computed values; fails where they differ by 0.01.
# Needs: DATA, a folder with the sets' published files as configs/retrieval_quality.yaml names them.
# Usage: DATA=FOLDER bash scripts/evaluation/run_collections.sh [key=value ...]; 'retrievers=[bm25]' takes a minute.
#   OUTPUT    folder of all that is built, of runs and metrics, and of the table (default: outputs/retrieval_quality)
set -euo pipefail
source "$(dirname "$0")/../env.sh"
exec "$PYTHON" -m verl.evaluation.retrieval_quality folder="${DATA:?name the folder of the published sets}" \
  output="${OUTPUT:-outputs/retrieval_quality}" "$@"
