"""Stored bits against what was lost: every method on given checkpoints and texts.

    python benchmarks/fidelity.py --case MODEL CALIBRATION WINDOW TEXT … [--case …] [--out FILE]

Each checkpoint is packed by each method, calibrated on sequences of 256 tokens of CALIBRATION, and
compared with itself in float32 on each TEXT: windows opened with the start token, every token of
the text scored. `--plot` draws perplexity against the bits that are stored of the linears.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import transformers
from matplotlib.figure import Figure

from spectool.evaluate.evaluate import Request, evaluate
from spectool.headers import read_layout
from spectool.machine import describe, peak_rss_bytes
from spectool.methods import resolve
from spectool.quantize.ledger import measure
from spectool.quantize.run import Job, Preprocess, quantize

Row = tuple[str, dict[str, Any]]

GROUPS = (32, 128, 0)
METHODS: list[Row] = [
    *(("gptq", {"bits": b, "group_size": g}) for b in (2, 3, 4) for g in GROUPS),
    *(("jlcm", {"bits": b, "epochs": 4}) for b in (2, 3, 4)),
    ("ptq161", {"epochs": 4}),
    ("ptq161 reshaped", {"epochs": 4}),
    *(("rtn", {"bits": b, "group_size": g}) for b in (2, 3, 4) for g in GROUPS),
    *(("hqq", {"bits": b, "group_size": 64}) for b in (2, 3, 4)),
    ("olive", {}),
    ("nf4", {}),
    ("int8", {}),
]
SAMPLES, SEQ_LEN = 64, 256
RESHAPED = {"steps": 200, "rate": 3e-4, "batch_size": 4}


def rows(
    model: str, calibration: str, window: int, texts: Sequence[str], name: str, options: Any
) -> list[dict[str, Any]]:
    """A row for each text."""
    method, _, reshaped = name.partition(" ")
    job = Job(
        method=method,
        config=resolve(method, "quantizer").Config(**options),
        calibration=[calibration],
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        preprocess=Preprocess(text=[calibration], **RESHAPED) if reshaped else None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        began = time.perf_counter()
        report = quantize(model, out, job)
        seconds = time.perf_counter() - began
        ledger = measure(read_layout(out))
        made = {
            "model": Path(model).name,
            "method": name,
            "options": options,
            "bits_linears": ledger.linears,
            "bits_file": ledger.file,
            "bytes": ledger.file_bytes,
            "quantize_seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "preprocess": report.preprocess,
        }
        found = []
        for text in texts:
            request = Request(
                texts=[text], window=window, bos=True, reference=model, dtype="float32",
                runtime="dense",
            )  # fmt: skip
            said = evaluate(str(out), request)
            figures = {key: said[key] for key in ("perplexity_ratio", "kl", "top1_agreement")}
            found.append(
                {
                    **made,
                    "text": Path(text).name,
                    "perplexity": said["perplexity"],
                    "reference_perplexity": said["reference"]["perplexity"],
                    **figures,
                }
            )
    return found


def show(row: dict[str, Any]) -> None:
    options = " ".join(f"{key}={value}" for key, value in row["options"].items())
    print(
        f"| {row['model']} | {row['text']} | {row['method']} {options} | {row['bits_linears']:.3f} "
        f"| {row['bits_file']:.2f} | {row['perplexity']['value']:.2f} "
        f"| {row['perplexity_ratio']:.3f} | {row['kl']:.4f} | {row['top1_agreement']:.1%} "
        f"| {row['quantize_seconds']:.0f} |",
        flush=True,
    )


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model and text."""
    panels = list(dict.fromkeys((row["model"], row["text"]) for row in found))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (model, text) in zip(axes, panels, strict=True):
        own = [row for row in found if (row["model"], row["text"]) == (model, text)]
        for method in dict.fromkeys(row["method"] for row in own):
            points = sorted(
                (row["bits_linears"], row["perplexity"]["value"])
                for row in own
                if row["method"] == method
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        axis.axhline(own[0]["reference_perplexity"], color="grey", linewidth=0.8)
        axis.set(title=f"{model}, {text}", xlabel="stored bits a weight", yscale="log")
        axis.set(ylim=(None, 1.35 * own[0]["reference_perplexity"]), xlim=(1.5, 5.5))
    axes[0].set(ylabel="perplexity")
    axes[0].legend(fontsize=7, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "spectool"}):
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="+", action="append", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    print("| model | text | method | bits, linears | file | perplexity | ratio | KL | top-1 | s |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    found: list[dict[str, Any]] = []
    for model, calibration, window, *texts in given.case:
        for name, options in METHODS:
            for row in rows(model, calibration, int(window), texts, name, options):
                found.append(row)
                show(row)
            if given.out:
                said = {"benchmark": "fidelity", "machine": describe(), "rows": found}
                given.out.write_text(json.dumps(said, indent=2) + "\n")
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
