#!/usr/bin/env bash
# A real checkpoint: compress it, train draft heads, say what was lost and gained, run it.
#
#     examples/compress_and_draft.sh [MODEL [DATA [TEXT [PROMPTS]]]]
#
# MODEL is a directory or a hub id (default Qwen/Qwen3-0.6B). DATA trains the heads (conversations or
# text), TEXT is what perplexity is measured on, PROMPTS are for speed. Without them public data sets
# are read. A 0.6 B model takes hours on a processor; a GPU is used where there is one.
set -euo pipefail
model=${1:-Qwen/Qwen3-0.6B}
data=${2:-hub:HuggingFaceH4/ultrachat_200k:train_sft}
text=${3:-hub:Salesforce/wikitext:wikitext-2-raw-v1:test}
prompts=${4:-hub:HuggingFaceH4/mt_bench_prompts:train}
device=${DEVICE:-auto}
out=${OUT:-compressed}

spectool quantize ptq161 "$model" "$out/packed" --dry-run
spectool quantize ptq161 "$model" "$out/packed" --device "$device"
spectool train-heads medusa "$out/packed" "$out/heads" --data "$data" --steps 2000 \
  --draft-vocab 32000 --device "$device"
spectool eval "$out/packed" --reference "$model" --text "$text" --device "$device"
spectool bench "$out/packed" --reference "$model" --prompts "$prompts" --limit 20 \
  --draft ngram --draft "$out/heads" --device "$device"
spectool chat "$out/packed" --draft "$out/heads" --device "$device"
