"""Count drafted texts that equal plain decoding on packed checkpoints, in float32 and bfloat16.

    python benchmarks/packed_drafting.py --shared FOLDER --out FILE.json [--each N]

Packs `codestory-10M` with every method that has a kernel, and decodes prompts of `decode.py`
greedily, 64 tokens each, plainly and with drafters that need no training. Products and attention
give a row the same bits whatever the other rows are, so every text must be plain decoding's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from record import write

from decode import write_prompts
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.kernels.precision import EXACT_ONLY, PRECISIONS, precisions_of
from spectool.machine import describe
from spectool.methods import import_method
from spectool.model.loading import load_model, load_tokenizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

DRAFTS = ("ngram", "trigram+recycle", "jacobi")
CALIBRATION = Path(__file__).parent.parent / "core/data/calibration/mixed.txt"
NEW_TOKENS = 64
# What is fitted to a text makes no difference here; the narrowest matrix has 160 rows.
OPTIONS = {name: {"epochs": 0} for name in ("ptq161", "jlcm", "scalar")} | {"vq": {"codes": 128}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=1, help="prompts of each kind")
    given = parser.parse_args()
    source, rows = given.shared / "models/codestory-10M", []
    texts = read_prompts(given.shared, given.each)
    for method in (*PRECISIONS, *EXACT_ONLY):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            job = QuantizeJob(
                method=method,
                config=import_method(method, "quantizer").Config(**OPTIONS.get(method, {})),
                calibration=(str(CALIBRATION),),
                samples=16,
                seq_len=256,
            )
            quantize(open_checkpoint(source), out, job)
            for activations in precisions_of(method):
                for dtype in (torch.float32, torch.bfloat16):
                    how = {"activations": activations, "dtype": str(dtype).removeprefix("torch.")}
                    same = count_same(out, texts, dtype, activations)
                    rows.append({"method": method, **how, "texts": len(texts), "same": same})
                    print(rows[-1], flush=True)
    write(
        given.out,
        {
            "benchmark": "packed drafting",
            "machine": describe(),
            "model": source.name,
            "new_tokens": NEW_TOKENS,
            "rows": rows,
        },
    )


def read_prompts(shared: Path, each: int) -> list[str]:
    """Return the prompts of `decode.py`, `each` of a kind."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "prompts.jsonl"
        write_prompts(shared / "data", path, each)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]


def count_same(
    packed: Path, texts: list[str], dtype: torch.dtype, activations: str
) -> dict[str, int]:
    """Count the texts of each drafter that equal plain decoding's."""
    checkpoint = open_checkpoint(packed)
    model = load_model(checkpoint, dtype=dtype, activations=activations)
    tokenizer = load_tokenizer(checkpoint)
    room = model.config.max_position_embeddings - NEW_TOKENS
    prompts = [tokenizer(text)["input_ids"][-room:] for text in texts]
    runner = Runner(model, tokenizer=tokenizer)
    plain = runner.generate(prompts, max_new_tokens=NEW_TOKENS)
    same = {}
    for draft in DRAFTS:
        runner.use(draft)
        found = runner.generate(prompts, max_new_tokens=NEW_TOKENS)
        pairs = zip(plain, found, strict=True)
        same[draft] = sum(one.token_ids == other.token_ids for one, other in pairs)
    return same


if __name__ == "__main__":
    main()
