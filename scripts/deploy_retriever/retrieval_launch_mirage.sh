#!/usr/bin/env bash
# Serve what the MIRAGE benchmark is answered from: the dense index of MedCorp on port 3000.
#   bash scripts/deploy_retriever/retrieval_launch_mirage.sh [--topk 8 ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/retrieval_launch_medcorp.sh" "$@"
