"""Small results, as commands print them with `--json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MACHINE = {
    "processor": "A <fast> processor",
    "cores": 2,
    "threads": 1,
    "threads_reason": "set by OMP_NUM_THREADS",
    "memory_bytes": 25_000_000_000,
    "versions": {"spectool": "0.2.0", "torch": "2.13.0"},
}


def quantize(method: str, bits: float, error: float) -> dict[str, Any]:
    names = ("self_attn.q_proj", "mlp.down_proj")
    return {
        "schema_version": 3,
        "command": f"spectool quantize {method} small packed-{method}-{bits:.0f}",
        "machine": MACHINE,
        "out": f"packed-{method}-{bits:.0f}",
        "method": method,
        "bits_per_weight": {"linears": bits + 0.378125, "file": bits + 2},
        "bytes": 1234567,
        "seconds": 3.25,
        "layers": [
            {"name": f"model.layers.{block}.{name}", "bits": bits, "error": error * (1 + block)}
            for block in range(2)
            for name in names
        ],
    }


def evaluation(method: str, bits: float, ratio: float, kl: float) -> dict[str, Any]:
    model = f"packed-{method}-{bits:.0f}"
    return {
        "schema_version": 3,
        "command": f"spectool eval {model} --reference small --text texts/stories.txt",
        "machine": MACHINE,
        "model": model,
        "methods": [method],
        "bits_per_weight": {"linears": bits + 0.378125, "file": bits + 2},
        "bytes": 1234567,
        "perplexity": {"value": 30 * ratio, "tokens": 8447, "window": 512, "bos": True},
        "reference": {"perplexity": 30.0},
        "perplexity_ratio": {"value": ratio, "lower": ratio - 0.0625, "upper": ratio + 0.03125},
        "kl": {"value": kl, "lower": kl / 2, "upper": 2 * kl, "median": kl / 4},
        "top1_agreement": 0.890625,
        "gates": [{"expression": "perplexity_ratio<=1.05", "value": ratio, "holds": ratio <= 1.05}],
        "tasks": {
            "quiz": {
                "accuracy": {"items": 40, "score": {"value": 0.5, "lower": 0.25, "upper": 0.75}}
            }
        },
        "decoder_layers": [
            {
                "name": f"model.layers.{block}",
                "error": {"value": kl * (1 + block), "lower": kl, "upper": 3 * kl},
                "hidden_error": {"value": 0.125, "lower": 0.0625, "upper": 0.25},
                "hidden_cosine": {"value": 0.9921875, "lower": 0.984375, "upper": 1.0},
                "attention": None,
                "gates": {"agreement": {"value": 0.96875, "lower": 0.9375, "upper": 1.0}},
            }
            for block in range(2)
        ],
        "read": [{"source": "texts/stories.txt", "rows": 1}],
    }


def _row(name: str, rate: float, speed: float) -> dict[str, Any]:
    return {
        "name": name,
        "prompts": 4,
        "new_tokens": 100,
        "drafted": 0 if name == "none" else 80,
        "accepted": 0 if name == "none" else 60,
        "tokens_per_forward": rate,
        "tokens_per_second": speed,
        "speedup": speed / 100,
        "lossless": True,
        "identical": None if name == "none" else 4,
    }


def bench() -> dict[str, Any]:
    drafter = {**_row("ngram:max_n=3", 2.125, 187.5), "chain": [1.5, 1.75, 1.875]}
    drafter |= {"acceptance_by_depth": [0.6875, 0.34375]}
    part = {"baseline": _row("none", 1.0, 100.0), "drafters": [drafter]}
    run = {
        **part,
        "model": "small",
        "runtime": "dense, float32",
        "categories": [{"category": name, **part} for name in ("qa", "story")],
        "batch_size": 1,
        "dtype": "float32",
    }
    made = {"schema_version": 3, "command": "spectool bench small --prompts p.jsonl"}
    return {**made, "machine": MACHINE, **run, "other_runs": [{**run, "batch_size": 4}]}


def heads() -> dict[str, Any]:
    return {
        "schema_version": 3,
        "out": "heads",
        "method": "hydra",
        "steps": 280,
        "seconds": 60.5,
        "accuracy": [0.5, 0.25],
        "conditional": [0.5, 0.75],
        "tokens_per_forward_estimate": 2.71875,
        "untrained_estimate": 1.15625,
    }


def certificate() -> dict[str, Any]:
    shape = {"forward": "fused", "drafter": "ngram"}
    return {
        "format_version": 1,
        "dtype": "float32",
        "activations": "exact",
        "prompts": 4,
        "tokens": 512,
        "promises": {"fused": ["rows", "texts", "laws"]},
        "broken": [],
        "texts": [
            {**shape, "batch_size": 1, "lossless": True, "prompts": 4, "tokens": 512,
             "identical": 4, "partings": [{"gap": 0.0078125}]}
        ],
        "laws": [{**shape, "statistic": 11.5, "degrees": 12, "p_value": 0.4375}],
    }  # fmt: skip


def trust() -> dict[str, Any]:
    dimension = {
        "items": 40,
        "unscored": 2,
        "reference": {"value": 62.5, "lower": 50.0, "upper": 71.875},
        "model": {"value": 56.25, "lower": 43.75, "upper": 68.75},
        "delta": {"value": -6.25, "lower": -9.375, "upper": -3.125},
        "p_holm": 0.046875,
        "verdict": "fail",
    }
    return {
        "schema_version": 3,
        "verdict": "fail",
        "items": 40,
        "dimensions": {"fairness": dimension},
        "not_measured": {"privacy": "no items"},
        "limits": "Proxies in English.",
        "gates": [],
    }


def peers() -> dict[str, Any]:
    rows = [{"method": "original", "text": "stories", "perplexity": 20.0, "kl": 0.0}]
    for seed in (0, 1):
        for bits, perplexity in ((2, 26.0), (3, 28.0), (4, 21.0)):
            row = {"method": "hqq", "options": {"bits": bits}, "seed": seed, "text": "stories"}
            row |= {"bits_linears": bits + 0.5, "perplexity": perplexity + seed, "kl": 1 / bits}
            rows.append(row)
    return {
        "benchmark": "fidelity",
        "model": "small",
        "window_tokens": {"stories": [9]},
        "rows": rows,
    }


ALL: dict[str, dict[str, Any]] = {
    "01-quantize": quantize("rtn", 3, 0.015625),
    "02-quantize": quantize("gptq", 2, 0.125),
    "03-eval": evaluation("rtn", 3, 1.0078125, 0.0009765625),
    "04-eval": evaluation("gptq", 2, 1.25, 0.03125),
    "05-bench": bench(),
    "06-train-heads": heads(),
    "07-certificate": certificate(),
    "08-peers": peers(),
    "09-trust": trust(),
}


def write(folder: Path, results: Mapping[str, Any] = ALL) -> Path:
    """Write results as files to a folder, which is made."""
    folder.mkdir(parents=True)
    for name, data in results.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder
