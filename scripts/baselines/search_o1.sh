#!/usr/bin/env bash
# Search-o1: search within reasoning, results condensed. Needs: the retriever on :3000, and a model named by MODEL.
# Usage: MODEL=FOLDER bash scripts/baselines/search_o1.sh [SEED] [key=value ...]; see agent.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/agent.sh" search_o1 "$@"
