#!/usr/bin/env bash
# Compress a checkpoint in CI, and fail the job where it lost too much or a drafter changed the output.
#
#     examples/ci.sh MODEL TEXT PROMPTS [METHOD [OPTION …]]
set -euo pipefail
model=$1 text=$2 prompts=$3
method=${4:-rtn}
out=$(mktemp -d)/packed

spectool quantize "$method" "$model" "$out" "${@:5}"
# Exit code 3 where a gate does not hold: the job fails.
spectool eval "$out" --reference "$model" --text "$text" --gate 'perplexity_ratio<=1.25' --json
# Exit code 1 where a lossless drafter's output differs from plain decoding in float32.
spectool bench "$out" --prompts "$prompts" --draft ngram --limit 4 --max-new-tokens 64 \
  --dtype float32 --json
