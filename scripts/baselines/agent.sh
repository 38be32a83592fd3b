#!/usr/bin/env bash
# Gather contexts with a baseline that searches in turns; the scripts beside this one call it.
# Usage: [MODEL=FOLDER] bash scripts/baselines/agent.sh search_r1|ircot|search_o1|deepretrieval|exsearch [SEED] [key=value ...]
#   MODEL      checkpoint in Hugging Face format or hub name; or remote.base_url=... remote.model=... for an endpoint
#   QUESTIONS  parquet (default: the published test set; setting=world_agent: the embedded world)
#   OUTPUT     folder of the contexts (default: outputs/contexts/NAME)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
name=${1:?name a baseline: search_r1, ircot, search_o1, deepretrieval or exsearch}
shift
seed=42
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seed=$1
  shift
fi
own=()
if [[ $* != *setting=* ]]; then
  own+=("questions=${QUESTIONS:-data/nq_hotpotqa_train/test_e5_s3_sampled.parquet}")
elif [[ -n ${QUESTIONS:-} ]]; then
  own+=("questions=$QUESTIONS")
fi
[[ -z ${MODEL:-} ]] || own+=("engine.model=$MODEL")
exec "$PYTHON" -m verl.evaluation.collect baseline="$name" output="${OUTPUT:-outputs/contexts/$name}" \
  sampling.seed="$seed" ${own[@]+"${own[@]}"} "$@"
