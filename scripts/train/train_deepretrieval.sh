#!/usr/bin/env bash
# Train DeepRetrieval on a task, by its recipe configs/recipe/deepretrieval_TASK.yaml; docs/deepretrieval.md has them all.
# Needs: the task's parquets under data/deepretrieval/, and for all but pubmed, ctgov, spider and bird its retriever.
# Usage: bash scripts/train/train_deepretrieval.sh TASK [SEED] [key=value ...], for example pubmed, dense/fever, nq_no_reason
set -euo pipefail
task=${1:?name a task, for example pubmed, nq, dense/fever or spider}
shift
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "deepretrieval_${task//\//_}" "$@"
