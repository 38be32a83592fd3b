#!/usr/bin/env bash
# Supervised fine-tuning by a recipe of configs/sft_recipe/; the file of examples comes as data.train=FILE (docs/sft.md).
# Usage: bash scripts/train/sft.sh RECIPE [key=value ...]; --cfg job prints the composed configuration and stops.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
recipe=${1:?name a recipe of configs/sft_recipe, for example exsearch_warmup}
shift
exec "$PYTHON" -m verl.trainer.main_sft sft_recipe="$recipe" trainer.folder="outputs/$recipe" "$@"
