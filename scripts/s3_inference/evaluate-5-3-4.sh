#!/usr/bin/env bash
# s3 inference, 5-3-4; see evaluate.sh. Usage: MODEL=FOLDER bash scripts/s3_inference/evaluate-5-3-4.sh [SEED] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh" 5-3-4 "$@"
