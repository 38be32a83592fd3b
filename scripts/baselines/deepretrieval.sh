#!/usr/bin/env bash
# DeepRetrieval: one rewritten query to BM25. Needs: BM25 on :4000; MODEL, or generator_llms/deepretrieval.sh running.
# Usage: MODEL=FOLDER bash scripts/baselines/deepretrieval.sh [SEED] [key=value ...]; see agent.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/agent.sh" deepretrieval "$@"
