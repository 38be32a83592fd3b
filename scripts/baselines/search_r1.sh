#!/usr/bin/env bash
# Search-R1: think, search, read, answer. Needs: the retriever on :3000, and a Search-R1 checkpoint named by MODEL.
# Usage: MODEL=FOLDER bash scripts/baselines/search_r1.sh [SEED] [key=value ...]; see agent.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/agent.sh" search_r1 "$@"
