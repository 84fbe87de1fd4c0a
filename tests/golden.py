"""Compare the bits that two versions of this project make, on one machine and one thread.

    python tests/golden.py [--before COMMIT] [--only PART ...] [--scratch DIR]

Bits differ between processors and builds of torch, so nothing is stored: a worktree of the commit
before the re-cut and the present tree run the same commands beside each other, and everything that
they make is compared: the SHA-256 of each tensor of each quantizer and of trained heads, the token
ids of each drafter, all figures of evaluations (but times and memory), and the keys of every
command's JSON. Then the present tree runs what the other one wrote.

The cases are written as the present tree spells them. `OPTIONS` and `KEYS` say what was renamed
since; nothing else may differ. Needs `../shared`. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models/stories260K"
DRAFT = SHARED / "models/llama2xs-279K"

# The last commit before the re-cut.
BEFORE = "86db14f"
# Options, methods and values of the present tree that were called otherwise before.
OPTIONS: dict[str, str] = {
    "--baselines": "--peers",
    "--init-from": "--from",
    "--lm-head": "--head",
    "--rules": "--plan",
    "--sequence-packing": "--pack",
}
# Keys of JSON before: how they are called now; "" if they are gone. New keys: `ADDED`.
KEYS: dict[str, str] = {
    "begin": "init_from",
    "beside": "other_runs",
    "head": "lm_head",
    "looks": "evaluations",
    "pack": "sequence_packing",
    "peers": "baselines",
}
ADDED = {"kv", "kv_bytes_per_token", "library", "variant", "origin", "flags"} | {
    f"{kernel}, {dtype}" for kernel in ("dense", "int8") for dtype in ("bfloat16", "float32")
}
# In a batch, requests join as soon as one ends, so that a table that they share with those that run
# (recycle's) has seen other text when they draft: texts are equal, counts are not.
COUNTS = re.compile(r"forwards|drafted|accepted|tokens_per_forward")

# Figures of a run that no two runs share, and those that names in files and versions enter.
UNSTEADY = re.compile(
    r"schema_version|bytes|\.file$|second|time|_ms|memory|rss|bytes_per|speed|share|machine|curve|path|python"
)

STORY = "Once upon a time there was a little {}. One day the {} went to the {} and saw a big {}. "
NOUNS = ["girl", "dog", "park", "tree", "boy", "cat", "house", "ball", "bird", "shop", "bear"]
PROMPTS = [
    "Once upon a time there was a little girl named Lily. She",
    "One day Tom and his dog went to the park. The dog ran",
    "The big bear was sad. He said",
    "Mom and dad went to the shop to buy a",
    "Ben liked his red ball. Ben liked his red ball. Ben liked",
    "It was a",
]

QUANTIZERS: dict[str, list[str]] = {
    "rtn": ["rtn", "--bits", "3"],
    "rtn-symmetric": ["rtn", "--bits", "4", "--symmetric", "--group-size", "0"],
    "nf4": ["nf4"],
    "int8": ["int8"],
    "hqq": ["hqq", "--bits", "3"],
    "gptq": ["gptq", "--bits", "3"],
    "gptq-2": ["gptq", "--bits", "2", "--no-act-order", "--symmetric"],
    "olive": ["olive"],
    "olive-activations": ["olive-activations"],
    "jlcm": ["jlcm", "--bits", "2", "--epochs", "2"],
    "jlcm-preferences": ["jlcm", "--form", "preferences", "--epochs", "2"],
    "scalar": ["scalar", "--bits", "2", "--epochs", "2"],
    "ptq161": ["ptq161", "--epochs", "2"],
    "vq": ["vq", "--codes", "32"],
    "auto": ["auto", "--bits", "3"],
    "budget": ["rtn", "--bits-budget", "2.8", "--embeddings", "int8"],
    "head": ["rtn", "--lm-head", "vq:codes=64,epochs=1"],
    "preprocess": ["gptq", "--bits", "2", "--preprocess", "{text}", "--preprocess-steps", "4"],
    "rules": ["gptq", "--rules", "{rules}", "--skip", "*.down_proj", "--allow-dense"],
}
NO_TEXT = {"auto"}
PARTS = ["quantize", "heads", "drafters", "eval"]
DRAFTERS: dict[str, list[str]] = {
    "none": ["none"],
    "ngram": ["ngram:nodes=8"],
    "recycle": ["recycle:nodes=8"],
    "trigram": ["trigram:nodes=8"],
    "trigram+recycle": ["trigram+recycle:nodes=8"],
    "jacobi": ["jacobi:window=8,tune=false"],
    "skip": ["skip:nodes=8,search=8"],
    "draft-chain": [f"{DRAFT}:depth=3,tune=false"],
    "draft-rsd-s": [f"{DRAFT}:tree=rsd-s,nodes=8"],
    "draft-iid": [f"{DRAFT}:tree=iid,nodes=8", "--verify", "k-seq"],
    "typical": ["recycle:nodes=8", "--verify", "typical", "--lossy"],
    "token-match": ["ngram:nodes=8", "--verify", "token-match"],
    "penalties": ["ngram:nodes=8", "--repetition-penalty", "1.2", "--no-repeat-ngram-size", "3"],
    "filters": ["recycle:nodes=8", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.02"],
    "batch": ["recycle:nodes=8", "--batch-size", "4"],
}
HEADS: dict[str, list[str]] = {
    "medusa": ["medusa"],
    "medusa-packed": [
        "medusa",
        "--sequence-packing",
        "--features",
        "hybrid",
        "--draft-vocab",
        "256",
    ],
    "hydra": ["hydra"],
    "hydra-plus": ["hydra", "--variant", "plus"],
    "eagle3": ["eagle3"],
    "clover": ["clover"],
    "chimera": ["chimera"],
    "ppd": ["ppd"],
    "hidden-transfer": ["hidden-transfer"],
    "regenerated": ["medusa", "--regenerate"],
}


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and what of it is compared: the files it makes, its JSON's values or its keys."""

    name: str
    command: list[str]
    makes: Path | None = None
    values: bool = True


def cases(place: Path, parts: list[str]) -> Iterator[Case]:
    """Yield the cases in an order in which each finds what it needs; `place` is written to."""
    text, rules, prompts = place / "text.txt", place / "rules.yaml", place / "prompts.txt"
    known = {"{text}": str(text), "{rules}": str(rules)}
    model = str(MODEL)

    def spelled(words: list[str]) -> list[str]:
        return [known.get(word, word) for word in words]

    for label, words in QUANTIZERS.items():
        for seed in ("0", "1"):
            out = place / f"q-{label}-{seed}"
            given = [] if label in NO_TEXT else ["--calibration", str(text), "--samples", "8"]
            length = [] if label in NO_TEXT else ["--seq-len", "64"]
            method, *options = spelled(words)
            command = ["quantize", method, model, str(out), *options, *given, *length]
            if "quantize" in parts:
                yield Case(f"quantize {label} {seed}", [*command, "--seed", seed], out)
    for label, words in HEADS.items():
        out = place / f"h-{label}"
        method, *options = words
        data = ["--data", str(text), "--steps", "20", "--batch-tokens", "512", "--seq-len", "128"]
        if "heads" in parts:
            yield Case(
                f"train-heads {label}",
                ["train-heads", method, model, str(out), *data, *options],
                out,
            )
    drafters = dict(DRAFTERS) if "drafters" in parts else {}
    if "heads" in parts:
        drafters |= {f"heads-{label}": [f"{place / f'h-{label}'}:nodes=8"] for label in HEADS}
    for label, words in drafters.items():
        for sampling in (["0"], ["0.8", "--seed", "0"], ["0.8", "--seed", "1"]):
            draw = ["--draft", *words, "--temperature", *sampling]
            command = ["generate", model, "--prompts", str(prompts), "--max-new-tokens", "60"]
            yield Case(f"generate {label} {' '.join(sampling)}", [*command, *draw])
    if "eval" in parts:
        out = place / "q-for-eval"
        yield Case("quantize for eval", ["quantize", "rtn", model, str(out), "--bits", "3"], out)
        on = ["--text", str(text), "--limit", "8000", "--window", "128"]
        yield Case("eval dense", ["eval", model, *on])
        yield Case("eval packed", ["eval", str(out), "--reference", model, *on])
        yield Case("eval blockwise", ["eval", str(out), "--reference", model, "--blockwise", *on])
        yield Case("inspect packed", ["inspect", str(out)], values=False)
        yield Case("inspect model", ["inspect", model], values=False)
        yield Case("list", ["list", "--all"], values=False)
        yield Case("doctor", ["doctor"], values=False)
        yield Case("plan", ["quantize", "rtn", model, str(out) + "-2", "--dry-run"], values=False)
        exported = str(place / "exported")
        words = ["export", str(out), exported, "--format", "dense"]
        yield Case("export", words, Path(exported), values=False)
        bench = [
            "bench",
            model,
            "--prompts",
            str(prompts),
            "--max-new-tokens",
            "24",
            "--limit",
            "2",
        ]
        yield Case("bench", [*bench, "--draft", "ngram:nodes=8"], values=False)


def write_inputs(place: Path) -> None:
    """Write the texts, prompts and rules that the cases read, the same in every run."""
    place.mkdir(parents=True)
    stories = [
        STORY.format(*(NOUNS[(at * step + 3) % len(NOUNS)] for step in (1, 2, 3, 5)))
        for at in range(600)
    ]
    (place / "text.txt").write_text("\n\n".join("".join(stories[at : at + 3]) for at in range(598)))
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (place / "rules.yaml").write_text(
        "layers:\n"
        "- match: '*.layers.0.*'\n  method: int8\n"
        "- match: '*.layers.1.self_attn.*'\n  method: jlcm\n  bits: 2\n  epochs: 1\n"
        "- match: '*.layers.2.mlp.*'\n  method: dense\n"
    )


def sums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, with dtype and shape, of all files in a folder."""
    found = {}
    for file in sorted(path.rglob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            for name, entry in json.loads(opened.read(size)).items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    opened.seek(8 + size + start)
                    digest = hashlib.sha256(opened.read(end - start)).hexdigest()
                    found[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value in JSON with its keys, joined by dots; a list's with `[i]`."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from leaves(each, f"{path}[{at}]")
    else:
        yield path, value


def _become(words: list[str], out: int, err: int, entry: Callable[[], None]) -> NoReturn:
    """Run the command line in this process, which ends with it."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"))
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"))
        sys.argv = words
        try:
            entry()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_case(
    case: Case, options: dict[str, str], entry: Callable[[], None], place: Path
) -> dict[str, Any]:
    """Run a command in a process of its own, and return what is compared of it."""
    words = [options.get(word, word) for word in case.command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            _become(["spectool", *words, "--json"], out.fileno(), err.fileno(), entry)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        stdout, remarks = out.read().decode().replace(str(place), "PLACE"), err.read().decode()
    code = os.waitstatus_to_exitcode(status)
    if code:
        return {"exit code": code, "stderr": remarks[-1500:], "words": " ".join(words)}
    pairs = list(leaves(json.loads(stdout)))
    found: dict[str, Any] = {
        "exit code": 0,
        "keys": sorted({re.sub(r"\[\d+\]", "[]", at) for at, _ in pairs}),
    }
    if case.values:
        found["values"] = {at: each for at, each in pairs if not UNSTEADY.search(at)}
    if case.makes is not None:
        found["tensors"] = sums(case.makes)
    return found


def run_all(place: Path, parts: list[str], options: dict[str, str], reads: bool) -> dict[str, Any]:
    """Run the cases with the tree that is on the path; with `reads`, those that write nothing."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 (once, before any fork)

    import spectool

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(spectool.__path__, "spectool."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from spectool.cli import main

    found = {}
    for case in cases(place, parts):
        if reads and (case.makes is not None or not case.values):
            continue
        found[case.name] = run_case(case, options, main, place)
        if found[case.name]["exit code"]:
            print(case.name, found[case.name]["stderr"], sep="\n", flush=True)
    return found


def lay_out(tree: Path, place: Path) -> Path:
    """Link the folders of a tree as the packages they are; returns what to put on the path."""
    table = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in table["package-dir"].items():
        target = place / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for item in (tree / folder).iterdir():
            if item.name != "__pycache__" and not (target / item.name).exists():
                (target / item.name).symlink_to(item)
    return place


def start(scratch: Path, tree: str, place: str, parts: list[str], *, reads: bool) -> dict[str, Any]:
    """Run the cases with one tree, in a process of its own; returns what is compared."""
    out = scratch / f"{tree}-{place}.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(scratch / f"packages-{tree}"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(scratch / f"cache-{tree}"),
    }
    job = {"place": str(scratch / place), "parts": parts, "reads": reads, "out": str(out)}
    job["options"] = OPTIONS if tree == "before" else {}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(job)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(out.read_text())


def renamed(path: str) -> str:
    """How a key's path before is called now; empty if it is gone."""
    keys = re.split(r"(\.|\[\]|\[\d+\])", path)
    now = [KEYS.get(key, key) for key in keys]
    return "" if "" in now and "" not in keys else "".join(now)


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for everything that differs but by `KEYS` and `ADDED`."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, {}), now.get(name, {})
        if old.get("exit code") != 0 or new.get("exit code") != 0:
            lines.append(f"{name}: exit codes {old.get('exit code')}, {new.get('exit code')}")
            continue
        keys = {renamed(key) for key in old["keys"]} - {""}
        extra = {key for key in new["keys"] if key.split(".")[-1].removesuffix("[]") not in ADDED}
        if keys != extra & (keys | extra):
            lines.append(
                f"{name}: keys gone {sorted(keys - set(new['keys']))}, new {sorted(extra - keys)}"
            )
        values = {renamed(at): value for at, value in old.get("values", {}).items()}
        for at, value in new.get("values", {}).items():
            counted = name.startswith("generate batch") and COUNTS.search(at)
            if at in values and values[at] != value and not counted:
                lines.append(f"{name}: {at}: {values[at]!r} before, {value!r} now")
        if old.get("tensors") != new.get("tensors"):
            known, made = old["tensors"], new["tensors"]
            other = [at for at in known.keys() | made.keys() if known.get(at) != made.get(at)]
            lines.append(f"{name}: {len(other)} tensors of {len(known)} differ, as {min(other)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--scratch", type=Path, help="where everything is written, and kept")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        job = json.loads(given.run)
        out = Path(job.pop("out"))
        found = run_all(Path(job.pop("place")), **job)
        out.write_text(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as made:
        scratch = (given.scratch or Path(made)).resolve()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        tree = scratch / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run(
            [*git, "worktree", "add", "-q", "--detach", str(tree), given.before], check=True
        )
        try:
            for label, root in (("before", tree), ("now", ROOT)):
                lay_out(root, scratch / f"packages-{label}")
                write_inputs(scratch / label)
            with ThreadPoolExecutor(2) as pool:
                before, now = pool.map(
                    lambda label: start(scratch, label, label, given.only, reads=False),
                    ("before", "now"),
                )
            read = start(scratch, "now", "before", given.only, reads=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    lines = compare(before, now)
    lines += [
        f"what was written before: {line}"
        for line in compare({name: before[name] for name in read}, read)
    ]
    print(*lines, sep="\n")
    print(f"{len(now)} cases, and {len(read)} on what was written before: {len(lines)} differ")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
