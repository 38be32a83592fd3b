#!/usr/bin/env bash
# Install if needed, then run the tests; arguments go to pytest. Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh
# Where there is Java, Lucene is tested too.
java_major=$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p') || java_major=0
if [[ ${java_major:-0} -ge 11 ]]; then
    bash scripts/install.sh lucene ||
        echo "test.sh: the lucene extra could not be installed; its tests are skipped" >&2
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
exec .venv/bin/python -m pytest "$@"
