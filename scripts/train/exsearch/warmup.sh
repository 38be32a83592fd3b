#!/usr/bin/env bash
# Build ExSearch's warm-up trajectories out of questions with supporting facts, with real retrieval.
# Needs: retriever on :3000 (scripts/deploy_retriever/retrieval_launch.sh).
# Usage: bash scripts/train/exsearch/warmup.sh QUESTIONS OUTPUT.jsonl [key=value ...]; for example limit=1000, or
# decomposition=annotator annotator.base_url=... annotator.model=... for sub-queries from a model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../env.sh"
questions=${1:?name the file of questions}
output=${2:?name the file to write}
shift 2
exec "$PYTHON" -m data_preprocess.warmup source.path="$questions" output="$output" "$@"
