#!/usr/bin/env bash
# Serve a model as a frozen generator over vLLM, on 127.0.0.1:8000 unless told otherwise.
# Usage: bash generator_llms/host.sh --model MODEL [--port 8000] [--tp 1] [options of vLLM, e.g. --max-model-len 8192]
# As published: --model Qwen/Qwen2.5-14B-Instruct-GPTQ-Int4 --tp 2 --max-model-len 8192
#   PYTHON  interpreter (default: the repo's .venv if there is one, else python)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m generator_llms.host "$@"
