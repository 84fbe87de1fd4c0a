"""Compare draft heads: equal training and evaluation, and speed at the cost of a larger model.

    python benchmarks/heads.py --shared FOLDER [--out DIR] [--steps N] [--only NAME ...]

FOLDER holds `models/codestory-10M` and `data` (see their README). The checkpoint first generates
the training text, at temperature 0.8 after prompts of the kinds that it was trained on. Every
method then trains on the same number of tokens of it, as many as the slowest processes in six
minutes on two cores. Prompts are code, stories, prose and arithmetic that neither the checkpoint
nor the heads were trained on, cut where plain greedy decoding starts to repeat itself. Tokens per
forward are measured in float32, greedy and at temperature 0.8, with intervals by resampling the
prompts (2.5 to 97.5 %); greedy output must always equal plain decoding. Speed is measured on the
widened copy (`widened.py`) with widened heads, which compute the same function at the cost of 400 M
parameters, without the quality of heads of such a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from main_job import RESULTS, spectool, write_texts
from safetensors.torch import load_file, save_file
from widened import widen

from decode import WIDTHS, write_prompts
from spectool.checkpoint import checksums
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import lineage, read_record
from spectool.decode.policy.chain import FirstPath
from spectool.decode.protocol import Drafter
from spectool.decode.result import Result, loop_start
from spectool.distill.data.regenerate import regenerate
from spectool.distill.data.samples import read_samples
from spectool.methods import import_method
from spectool.model.meta import build_meta, read_config

# Options that were the best of a few in short trials.
METHODS: dict[str, tuple[str, ...]] = {
    "medusa": ("--learning-rate", "3e-3"),
    "hydra-plain": ("--variant", "plain", "--learning-rate", "3e-3"),
    "hydra": ("--learning-rate", "3e-3"),
    "eagle3": ("--ttt-steps", "4", "--learning-rate", "4e-3"),
    "clover": ("--learning-rate", "3e-3"),
    "chimera": ("--learning-rate", "3e-3"),
    "ppd": ("--learning-rate", "1e-2"),
    "hidden-transfer": ("--learning-rate", "3e-3"),
}
FREE = ("ngram+recycle:nodes=32", "trigram+recycle:nodes=32")
FREE_TUNED = ("ngram+recycle:tune", "trigram+recycle:tune")
NODES = (8, 16, 32, 64)
CHAINS = range(1, 8)
PARTS = ("train", "decode", "packed", "speed")
# Heads of these methods are trained on the quantized model too, and run on both models.
ON_PACKED = ("hydra",)
SEQ_LEN, BATCH_TOKENS = 256, 2048


def generate_training_text(model: Path, texts: dict[str, Path], path: Path, tokens: int) -> float:
    """Let the checkpoint continue the first tokens of training texts; return the seconds taken."""
    runner = Runner(model, dtype=torch.float32)
    assert runner.tokenizer is not None
    samples = read_samples([str(texts["train"])], runner.tokenizer, seq_len=SEQ_LEN)
    random.Random(0).shuffle(samples)
    began, written = time.perf_counter(), 0
    with path.open("w", encoding="utf-8") as file:
        for number in itertools.count():
            group = samples[32 * number : 32 * (number + 1)]
            if written >= tokens or not group:
                return time.perf_counter() - began
            for sample in regenerate(
                runner, group, seq_len=SEQ_LEN, temperature=0.8, seed=number, batch_size=32
            ):
                written += len(sample.tokens)
                file.write(json.dumps({"text": runner.tokenizer.decode(sample.tokens)}) + "\n")
    raise AssertionError


def decode(
    runner: Runner, draft: str | Drafter | None, jobs: Any, temperature: float
) -> list[Result]:
    """Decode the prompts of `jobs`, each with its limit of new tokens."""
    runner.use(draft)
    prompts, limits = [prompt for prompt, _ in jobs], [limit for _, limit in jobs]
    return runner.generate(prompts, max_new_tokens=limits, temperature=temperature)


def metrics(results: Sequence[Result], categories: Sequence[str]) -> dict[str, Any]:
    """Compute tokens per forward of all results and of each category, with intervals."""
    by_category = {}
    for name in ("all", *dict.fromkeys(categories)):
        chosen = [r for r, c in zip(results, categories, strict=True) if name in ("all", c)]
        rng = random.Random(0)
        drawn = sorted(rate(rng.choices(chosen, k=len(chosen))) for _ in range(2000))
        by_category[name] = {"mean": rate(chosen), "low": drawn[50], "high": drawn[1949]}
    return by_category


def rate(results: Sequence[Result]) -> float:
    """Compute tokens per forward."""
    return sum(len(r.token_ids) for r in results) / sum(r.forwards for r in results)


def widen_heads(heads: Path, model: Path, wide: Path, out: Path) -> None:
    """Write the heads with the widened copy's dimensions, padded with zeros.

    Where several states are concatenated, each keeps its own part of the columns.
    """
    record = read_record(heads)
    drafter = import_method(record.method, "drafter")
    config = drafter.Heads.Config.from_dict(record.options)
    tensors = load_file(heads / HEADS_FILE)
    with torch.device("meta"):
        architecture = build_meta(read_config(open_checkpoint(wide)))
        made = drafter.Heads(config, architecture, tensors.get("token_map"))
    narrow, width = record.target["hidden_size"], WIDTHS["hidden"]
    widened = {}
    for name, wanted in made.state_dict().items():
        old = tensors[name]
        if old.shape == wanted.shape:
            widened[name] = old
            continue
        if name.endswith("norm.weight"):
            old = old * (narrow / width) ** 0.5
        new = torch.zeros(wanted.shape, dtype=old.dtype)
        parts = [
            [(i * width, i * narrow, narrow) for i in range(size // narrow)]
            if size % narrow == 0 and size // narrow == to // width
            else [(0, 0, size)]
            for size, to in zip(old.shape, wanted.shape, strict=True)
        ]
        for corner in itertools.product(*parts):
            into = tuple(slice(start, start + size) for start, _, size in corner)
            new[into] = old[tuple(slice(start, start + size) for _, start, size in corner)]
        widened[name] = new
    opened = open_checkpoint(wide)
    target = {
        **record.target,
        "hidden_size": width,
        "fingerprint": opened.fingerprint(),
        "lineage": lineage(opened),
    }
    out.mkdir(parents=True)
    save_file(widened, out / HEADS_FILE)
    stored = {HEADS_FILE: dataclasses.asdict(checksums.of_file(out / HEADS_FILE))}
    record = dataclasses.replace(record, target=target, checksums=stored)
    (out / HEADS).write_bytes(record.as_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/heads"))
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--each", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the widened copy")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--name", default="heads-2-core-cpu")
    given = parser.parse_args()
    model, out = given.shared / "models/codestory-10M", given.out
    out.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / f"{given.name}.json"
    report: dict[str, Any] = {"model": model.name, "steps": given.steps}
    if kept.exists() and set(given.parts) != set(PARTS):
        report |= json.loads(kept.read_text(encoding="utf-8"))

    def save() -> None:
        text = record.to_text(report).replace(f"{out}/", "").replace(f"{model.parent}/", "")
        kept.write_text(text + "\n", encoding="utf-8")

    if "train" in given.parts:
        train(report, model, out, given, save)
    write_prompts(given.shared / "data", out / "prompts.jsonl", given.each)
    if "decode" in given.parts:
        decode_all(report, model, out, given.only, save)
    if "packed" in given.parts:
        cross(report, model, out, given, save)
    if "speed" in given.parts:
        time_all(report, model, out, given, save)


def train(report: dict[str, Any], model: Path, out: Path, given: Any, save: Any) -> None:
    """Generate the training text, and train each method's heads on equally many tokens of it."""
    data = out / "own.jsonl"
    if not data.exists():
        texts = write_texts(given.shared / "data", out / "texts")
        partial = out / "own.partial"
        tokens = given.steps * BATCH_TOKENS
        report["own_text_seconds"] = generate_training_text(model, texts, partial, tokens)
        partial.rename(data)
    for name in given.only:
        done = train_one(name, model, out / name, data, given.steps)
        report.setdefault("heads", {})[name] = {**done, "out": name}
        save()


def train_one(name: str, model: Path, heads: Path, data: Path, steps: int) -> dict[str, Any]:
    """Train the heads of one method."""
    return spectool(
        "train-heads", name.removesuffix("-plain"), model, heads, "--data", data, "--seq-len",
        SEQ_LEN, "--batch-tokens", BATCH_TOKENS, "--steps", steps, *METHODS[name], "--overwrite",
    )  # fmt: skip


def cross(report: dict[str, Any], model: Path, out: Path, given: Any, save: Any) -> None:
    """Run heads of the model and of its 3-bit version on both: greedy tokens per forward."""
    packed = out / "packed"
    if not packed.exists():
        spectool("quantize", "gptq", model, packed, "--bits", 3, "--calibration", out / "own.jsonl")
    for name in ON_PACKED:
        train_one(name, packed, out / f"{name}-of-packed", out / "own.jsonl", given.steps)
    for target in (model, packed):
        runner, _, categories, jobs, plain = open_prompts(target, out)
        for name in ON_PACKED:
            for heads in (out / name, out / f"{name}-of-packed"):
                results = decode(runner, f"{heads}:nodes=32", jobs, 0.0)
                same = [a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)]
                entry = {"identical": sum(same), **metrics(results, categories)["all"]}
                report.setdefault("packed", {})[f"{heads.name} on {target.name}"] = entry
                print(heads.name, target.name, entry, flush=True)
                save()


def open_prompts(
    model: Path, out: Path
) -> tuple[Runner, list[str], list[str], list[tuple[str, int]], list[Result]]:
    """Open a model and decode the prompts plainly.

    Returns the runner, the prompts' texts and categories, the jobs, each cut where plain greedy
    text starts to repeat itself, and the plain results of the jobs.
    """
    prompts = read_rows(out / "prompts.jsonl")
    runner = Runner(model, dtype=torch.float32)
    assert runner.tokenizer is not None
    texts = [
        row["prompt"]
        if "prompt" in row
        else runner.tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        for row in prompts
    ]
    categories = [row["category"] for row in prompts]
    plain = decode(runner, None, [(text, 96) for text in texts], 0.0)
    jobs = [
        (text, max(1, loop_start(result.token_ids)))
        for text, result in zip(texts, plain, strict=True)
    ]
    plain = decode(runner, None, jobs, 0.0)
    return runner, texts, categories, jobs, plain


def decode_all(report: dict[str, Any], model: Path, out: Path, names: list[str], save: Any) -> None:
    """Measure tokens per forward on held-out prompts by number of nodes; compare greedy output."""
    runner, texts, categories, jobs, plain = open_prompts(model, out)
    report["prompts"], report["new_tokens"] = len(jobs), sum(len(r.token_ids) for r in plain)
    specs = [f"{out / name}:nodes={nodes}" for name in names for nodes in NODES]
    for spec in [*FREE, *specs]:
        greedy = decode(runner, spec, jobs, 0.0)
        same = [a.token_ids == b.token_ids for a, b in zip(greedy, plain, strict=True)]
        entry = {"identical": sum(same), "greedy": metrics(greedy, categories)}
        if "nodes=32" in spec:
            sampled = decode(runner, spec, [(text, 64) for text in texts], 0.8)
            entry["temperature 0.8"] = metrics(sampled, categories)
            if (drafter := runner.drafter).can_be_cut:
                entry["chains"] = []
                for depth in CHAINS:
                    drafter.policies = [FirstPath(depth)]
                    entry["chains"].append(rate(decode(runner, drafter, jobs, 0.0)))
        report.setdefault("decoded", {})[Path(spec).name] = entry
        print(spec, entry["identical"], entry["greedy"]["all"], flush=True)
        save()


def time_all(report: dict[str, Any], model: Path, out: Path, given: Any, save: Any) -> None:
    """Measure the speed of widened heads on the widened copy."""
    wide = out / f"widened-{given.dtype}"
    shutil.rmtree(wide, ignore_errors=True)
    report["parameters_widened"] = widen(model, wide, **WIDTHS, dtype=given.dtype)
    shutil.rmtree(out / "wide", ignore_errors=True)
    drafts: list[Any] = [word for draft in FREE_TUNED for word in ("--draft", draft)]
    for name in given.only:
        widen_heads(out / name, model, wide, out / "wide" / name)
        drafts += ["--draft", f"{out / 'wide' / name}:tune"]
    for temperature in (0.0, 0.8):
        report[f"widened, temperature {temperature}"] = spectool(
            "bench", wide, "--prompts", out / "prompts.jsonl", "--max-new-tokens", 64,
            "--per-category", 3, "--dtype", given.dtype, "--temperature", temperature, *drafts,
        )  # fmt: skip
        save()
    shutil.rmtree(wide)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
