#!/usr/bin/env bash
# Score s3's contexts as they are, without selection, without round 0, and without either; see verl/evaluation/variants.py.
# Needs and usage: as run.sh, for example run_ablation.sh contexts.s3=outputs/contexts/s3_8_3_3
exec bash "$(dirname "$0")/run.sh" 'ablate=[no_selection,no_round_0,neither]' "$@"
