#!/usr/bin/env bash
# Gather contexts for the test questions with a trained s3 searcher, greedily: a-b-T is top-k, selected at most, turns.
# Needs: the retriever on :3000, and a checkpoint in Hugging Face format named by MODEL (default: the training's last).
# Usage: MODEL=FOLDER bash scripts/s3_inference/evaluate.sh A-B-T [SEED] [key=value ...]; --cfg job is a dry run,
# setting=world plays the tiny searcher on the embedded world.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
IFS=- read -r topk selected turns <<<"${1:?give a-b-T, for example 8-3-3}"
name=${1//-/_}
shift
seed=42
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=$1
  shift
fi
own=()
[[ $* == *setting=* ]] || own+=(setting=nq_hotpotqa)
[[ -z ${QUESTIONS:-} ]] || own+=("questions=$QUESTIONS")
[[ -z ${MODEL:-} ]] || own+=("engine.model=$MODEL")
exec "$PYTHON" -m verl.evaluation.collect method=searcher "${own[@]+"${own[@]}"}" \
  output="${OUTPUT:-outputs/contexts/s3_$name}" \
  search.topk="$topk" search.max_selected="$selected" search.max_turns="$turns" sampling.seed="$seed" \
  retriever.url=http://127.0.0.1:3000/retrieve \
  "$@"
