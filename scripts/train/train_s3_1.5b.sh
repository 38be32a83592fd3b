#!/usr/bin/env bash
# s3 with a 1.5B searcher on three GPUs. See train.sh. Usage: bash scripts/train/train_s3_1.5b.sh [SEED] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" s3_1.5b "$@"
