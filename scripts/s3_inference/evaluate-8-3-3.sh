#!/usr/bin/env bash
# s3 inference, 8-3-3; see evaluate.sh. Usage: MODEL=FOLDER bash scripts/s3_inference/evaluate-8-3-3.sh [SEED] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh" 8-3-3 "$@"
