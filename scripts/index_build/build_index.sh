#!/usr/bin/env bash
# Build an index; a dense one of another kind with --index_kind (see `python -m verl.retrieval.build plan --help`).
#   CORPUS_PATH=data/wiki-18.jsonl SAVE_DIR=indexes/e5 bash scripts/index_build/build_index.sh [--index_kind IVF-SQ8 ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

: "${CORPUS_PATH:?set it to the corpus: jsonl, tsv or a BEIR folder, plain or gzipped}"
: "${SAVE_DIR:?set it to the folder that the index will have}"

exec "$PYTHON" -m verl.retrieval.build \
  --retriever_name "${RETRIEVER_NAME:-e5}" \
  --corpus_path "$CORPUS_PATH" \
  --save_dir "$SAVE_DIR" \
  "$@"
