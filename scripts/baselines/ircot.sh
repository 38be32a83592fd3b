#!/usr/bin/env bash
# IRCoT: retrieval interleaved with reasoning steps. Needs: the retriever on :3000, and an instruct model named by MODEL.
# Usage: MODEL=FOLDER bash scripts/baselines/ircot.sh [SEED] [key=value ...]; see agent.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/agent.sh" ircot "$@"
