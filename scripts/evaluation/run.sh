#!/usr/bin/env bash
# Score gathered contexts with the frozen generator and write one report over all methods.
# Needs: the generator on :8000 (generator_llms/host.sh) and the folders under CONTEXTS.
# Usage: bash scripts/evaluation/run.sh [contexts.NAME=FOLDER ...] [key=value ...]; without names, every folder found.
#   CONTEXTS  where the folders are (default: outputs/contexts); zero_shot and cot are asked without documents
#   OUTPUT    folder of the report (default: outputs/report)
set -euo pipefail
source "$(dirname "$0")/../env.sh"
contexts=()
if [[ $* != *contexts.* ]]; then
  for folder in "${CONTEXTS:-outputs/contexts}"/*/; do
    [[ -f $folder/contexts.jsonl ]] || continue
    name=$(basename "$folder" | tr -c 'a-zA-Z0-9_\n' _)
    contexts+=("contexts.$name=${folder%/}")
    [[ $name != zero_shot && $name != cot ]] || contexts+=("prompts.$name=$name")
  done
fi
exec "$PYTHON" -m verl.evaluation.evaluate output="${OUTPUT:-outputs/report}" \
  generator.base_url=http://127.0.0.1:8000/v1 ${contexts[@]+"${contexts[@]}"} "$@"
