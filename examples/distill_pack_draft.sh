#!/usr/bin/env bash
# The whole line: distil a checkpoint so that it decodes in fewer passes, compress it, train draft
# heads for the result, say what was lost and gained, run it.
#
#     examples/distill_pack_draft.sh MODEL DATA TEXT PROMPT OUT [STEPS [LEARNING-RATE]]
#
# MODEL is a directory or a hub id. DATA trains (conversations or text), TEXT is held out. Distillation
# trains all weights in float32; add --lora 64 to it for a model above a few hundred million parameters.
set -euo pipefail
model=$1 data=$2 text=$3 prompt=$4 out=$5
steps=${6:-1000} rate=${7:-2e-5}

spectool distill consistency "$model" "$out/distilled" --data "$data" --steps "$steps" \
  --learning-rate "$rate" --seq-len 256 --new-tokens 128
spectool eval "$out/distilled" --reference "$model" --text "$text"
spectool quantize gptq "$out/distilled" "$out/packed" --bits 4 --calibration "$data"
spectool train-heads medusa "$out/packed" "$out/heads" --data "$data" --steps "$steps" --seq-len 256 \
  --regenerate
spectool eval "$out/packed" --reference "$out/distilled" --text "$text"
for draft in none jacobi jacobi+recycle "$out/heads"; do
  spectool generate "$out/packed" --prompt "$prompt" --max-new-tokens 48 --draft "$draft"
done
