#!/usr/bin/env bash
# s3 as published: PPO, Qwen2.5-7B-Instruct-1M, 8-3-3, five GPUs. See train.sh. Usage: bash scripts/train/train_s3.sh [SEED] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" s3_8_3_3 "$@"
