"""Measure what rounding activations adds to each method's divergence from the original.

    python benchmarks/fidelity.py texts SHARED FOLDER
    python benchmarks/activations.py MODEL CALIBRATION TEXT ... --out FILE [--only METHOD ...]

Quantizes MODEL with every method that has products with integers, calibrated as in `fidelity.py`,
and runs the result as `generate` and `eval` do, in float32, with exact activations, with int8 and,
where that adds too much, with int16. Each is compared with the original on the TEXTs: KL in nats
per token, over the tokens of all. FILE gets the rows of the table in `kernels/precision.py`, which
says what `--activations auto` does. Those that it holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity import SAMPLES, SEQ_LEN
from record import write

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.options import CacheOptions
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.kernels.precision import LEAST, SHARE, Row
from spectool.machine import describe
from spectool.methods import import_method
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("rtn", {"bits": bits}) for bits in (4, 2, 3, 8)),
    ("nf4", {}),
    ("int8", {}),
    ("ptq161", {"epochs": 4}),
    *(("gptq", {"bits": bits}) for bits in (4, 2, 3, 8)),
    *(("hqq", {"bits": bits}) for bits in (4, 2)),
    ("jlcm", {"bits": 2, "epochs": 4}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="dense checkpoint")
    parser.add_argument("calibration", help="text that methods are calibrated on")
    parser.add_argument("texts", nargs="+", help="held-out texts")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", help="methods to measure; default: all")
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    done = [(row["method"], row["options"]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        references = save_references(given.model, given.texts, Path(folder))
        for method, options in METHODS:
            if (method, options) in done or method not in (given.only or [method]):
                continue
            out = Path(folder) / method
            job = QuantizeJob(
                method=method,
                config=import_method(method, "quantizer").Config(**options),
                calibration=(given.calibration,),
                samples=SAMPLES,
                seq_len=SEQ_LEN,
            )
            quantize(open_checkpoint(given.model), out, job)
            rows.append({"method": method, "options": options} | compare(out, references))
            shutil.rmtree(out)
            print(rows[-1], flush=True)
            write(
                given.out,
                {
                    "benchmark": "activations",
                    "machine": describe(),
                    "model": Path(given.model).name,
                    "texts": [Path(text).stem for text in given.texts],
                    "share": SHARE,
                    "least": LEAST,
                    "rows": rows,
                },
            )


def save_references(model: str, texts: Sequence[str], folder: Path) -> list[Path]:
    """Write the original's log-probabilities on each text, all of them."""
    files = []
    for text in texts:
        files.append(folder / f"{Path(text).stem}.logp")
        options = EvalOptions(text=(text,), bos=True, save_reference=files[-1])
        evaluate(Context(CacheOptions(model=model, dtype="float32"), options))
    return files


def compare(packed: Path, references: Sequence[Path]) -> dict[str, Any]:
    """Return the divergence of a packed checkpoint with exact activations, and what others add."""
    exact, tokens = divergence(packed, references, "exact")
    row = Row(exact, divergence(packed, references, "int8")[0] - exact)
    if row.auto == "exact":
        row = Row(exact, row.int8, divergence(packed, references, "int16")[0] - exact)
    added = {"int8": row.int8, "int16": row.int16}
    return {"tokens": tokens, "kl": exact, "added": added, "auto": row.auto}


def divergence(packed: Path, references: Sequence[Path], activations: str) -> tuple[float, int]:
    """Return the KL from the original, and the number of tokens that it is the mean of."""
    total, tokens = 0.0, 0
    load = CacheOptions(model=str(packed), dtype="float32", activations=activations)
    for reference in references:
        options = EvalOptions(reference=str(reference), measure=("divergence",))
        context = Context(load, options)
        context.needs |= {"windows", "reference"}
        assert context.scores.activations == activations
        scores = context.scores
        total += scores.mean("kl") * scores.num_tokens
        tokens += scores.num_tokens
    return total / tokens, tokens


if __name__ == "__main__":
    main()
