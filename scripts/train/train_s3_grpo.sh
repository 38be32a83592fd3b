#!/usr/bin/env bash
# s3 with GRPO on four GPUs. See train.sh. Usage: bash scripts/train/train_s3_grpo.sh [SEED] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" s3_grpo "$@"
