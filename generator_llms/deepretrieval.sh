#!/usr/bin/env bash
# Serve DeepRetrieval's query rewriter over vLLM, as published: a 3B model on two GPUs, 2048 tokens, 127.0.0.1:8000.
# Usage: bash generator_llms/deepretrieval.sh [--model MODEL] [--port 8000] [--tp 2] [options of vLLM]
# Published: DeepRetrieval/DeepRetrieval-{NQ-BM25-3B,TriviaQA-BM25-3B,SQuAD-BM25-3B-200}; a folder of your own does too.
#   PYTHON  interpreter (default: the repo's .venv if there is one, else python)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$here/host.sh" --model DeepRetrieval/DeepRetrieval-NQ-BM25-3B --tp 2 --max-model-len 2048 "$@"
