#!/usr/bin/env bash
# Evaluate DeepRetrieval on a task: collect one method's queries, then score every method collected so far in one report.
# Needs: data/deepretrieval/TASK/test.parquet, and what the task searches; docs/deepretrieval.md says how to get both.
# Usage: bash scripts/evaluation/deepretrieval.sh TASK METHOD [key=value of s3 collect ...] [-- key=value of s3 evaluate-queries ...]
#   METHOD  raw_query, or any name of a model: one that ends in _no_reason is asked without reasoning. The model is
#           MODEL=FOLDER (a checkpoint's hf/), or remote.base_url=... remote.model=... remote.mode=chat for an endpoint
#   FOLDER  of contexts and report (default: outputs/deepretrieval/TASK)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
task=${1:?name a task, for example pubmed, nq, dense/scifact or spider} method=${2:?name a method, for example raw_query}
shift 2
task=${task//\//_}
data=${task#dense_}
data=data/deepretrieval/${data%_dense}
family=beir metric=ndcg collect=() evaluate=()
case $task in
  pubmed | ctgov) family=literature metric=recall collect=("literature.engine=$task") evaluate=("literature.engine=$task" "setting=$task") ;;
  nq | triviaqa | squad) family=evidence metric=hits ;;
  spider | bird) family=sql metric=execution evaluate=("execution.dataset=$task" "sql.databases=data/raw/$task") ;;
  *dense*) family=dense ;;
esac
case $method in
  raw_query) collect+=(method=raw_query) ;;
  *) collect+=(method=searcher) ;;
esac
[[ $method != *_no_reason ]] || collect+=(search.reasoning=false search.prefill=false)
[[ -z ${MODEL:-} || $method == raw_query ]] || collect+=("engine.model=$MODEL")
while (($#)) && [[ $1 != -- ]]; do
  # An endpoint cannot be made to begin with a tag.
  [[ $1 != remote.base_url=* ]] || collect+=(search.prefill=false)
  collect+=("$1")
  shift
done
(($# == 0)) || shift
folder=${FOLDER:-outputs/deepretrieval/$task}
contexts=$folder/contexts/${method//[^a-zA-Z0-9_]/_}
mkdir -p "$contexts"
# Questions that a service failed are in errors.jsonl, and are scored as failures; anything else ends here.
"$PYTHON" -m verl.evaluation.collect setting="deepretrieval_$family" questions="$data/test.parquet" output="$contexts" \
  "${collect[@]}" || [[ -s $contexts/errors.jsonl ]]
for found in "$folder"/contexts/*/; do
  evaluate+=("contexts.$(basename "$found")=${found%/}")
done
exec "$PYTHON" -m verl.evaluation.deepretrieval metric="$metric" output="$folder/report" "${evaluate[@]}" "$@"
