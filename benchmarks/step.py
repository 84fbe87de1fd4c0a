"""Measure a whole step of decoding beside llama.cpp and transformers, at equal shapes and bits.

    python benchmarks/step.py --llama FOLDER [--models 400M 1.1B] [--bits 16 8 4 2 1.6 32]
        [--busy 0 1] [--forward modules fused] [--activations int16 int8] [--work DIR]
        [--out FILE.json]

FOLDER holds the packages `llama_cpp` and `gguf`, as llama-cpp-python is installed. The models are
Llamas with random weights, 2048 wide, written for transformers and as GGUF; the time of a step does
not depend on the weights. Each engine runs in a process of its own, with its own settings, and all
of one width of weights take turns; the medians over the rounds are reported. A step is

    token   a token of plain greedy decoding
    rows    a pass of 8 tokens after the prompt, with the logits of all of them
    batch   a step of plain greedy decoding of 8 texts together

Beside them stands the time to read the stored bytes once, at the bandwidth measured here
(`peaks.py`). `layer` is what a layer costs however narrow it is: the slope of a token's time from 8
to 24 layers of a model 256 wide. With `--busy 1` another process computes without pause. Rows of
FILE.json for other models, bits and numbers of busy processes are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from random_llama import CONTEXT, FORMATS, NARROW, PACKED, SHAPES, VOCABULARY, write_models

ROWS = 8
PROMPT = [(7 * token) % VOCABULARY for token in range(1, 9)]


class Engine(ABC):
    """An engine with one model, in this process. Times are seconds of one step."""

    @abstractmethod
    def token(self, count: int, texts: int = 1) -> float:
        """Decode `count` tokens of each of `texts` texts together, after the first ones."""

    @abstractmethod
    def rows(self, count: int) -> float:
        """Feed `ROWS` tokens after the prompt in one pass, `count` times."""


class Ours(Engine):
    def __init__(self, path: str, threads: int, dtype: str, forward: str, how: str) -> None:
        import torch

        from spectool.checkpoint.tensors import open_checkpoint
        from spectool.decode.generate import Runner
        from spectool.decode.tree import chain
        from spectool.model.loading import load_model

        torch.set_num_threads(threads)
        checkpoint = open_checkpoint(path)
        model = load_model(checkpoint, dtype=getattr(torch, dtype), activations=how)
        self.runner = Runner(model, **({"forward": forward} if forward else {}))
        self.chain = chain(PROMPT[:ROWS], kind="deterministic")

    def token(self, count: int, texts: int = 1) -> float:
        stamps: list[float] = []
        self.runner.generate(
            [PROMPT] * texts,
            max_new_tokens=count + 1,
            batch_size=texts,
            on_tokens=lambda *_: stamps.append(time.perf_counter()),
        )
        # Every text's first token comes from its prompt.
        assert len(stamps) == (count + 1) * texts
        return (stamps[-1] - stamps[texts - 1]) / count

    def rows(self, count: int) -> float:
        target = self.runner.target
        cache: Any = target.cache(1, CONTEXT)
        target.prefill(cache, [PROMPT])
        return repeat(lambda: target.verify(cache, [self.chain]), count)


class Transformers(Engine):
    def __init__(self, path: str, threads: int, dtype: str, forward: str, how: str) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model: Any = LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def token(self, count: int, texts: int = 1) -> float:
        stamps: list[float] = []

        def stamp(ids: Any, scores: Any) -> Any:
            stamps.append(time.perf_counter())
            return scores

        ids = self.torch.tensor([PROMPT] * texts)
        self.model.generate(
            ids, do_sample=False, max_new_tokens=count + 1, logits_processor=[stamp],
            attention_mask=self.torch.ones_like(ids), pad_token_id=0,
        )  # fmt: skip
        return (stamps[-1] - stamps[0]) / count

    def rows(self, count: int) -> float:
        ids = self.torch.tensor([PROMPT])
        with self.torch.inference_mode():
            cache = self.model(ids, use_cache=True).past_key_values

            def step() -> None:
                self.model(ids[:, :ROWS], past_key_values=cache)
                cache.crop(-ROWS)

            return repeat(step, count)


class LlamaCpp(Engine):
    def __init__(self, path: str, threads: int, dtype: str, forward: str, how: str) -> None:
        import numpy

        self.numpy = numpy
        self.lib: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.quiet = self.lib.llama_log_callback(lambda *_: None)
        self.lib.llama_log_set(self.quiet, ctypes.c_void_p(0))
        model = self.lib.llama_model_load_from_file(
            path.encode(), self.lib.llama_model_default_params()
        )
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * ROWS, ROWS
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(model, params)
        assert model and self.context, f"llama.cpp cannot load {path}"
        self.memory = self.lib.llama_get_memory(self.context)
        self.batch = self.lib.llama_batch_init(len(PROMPT), 0, 1)

    def feed(self, nodes: Sequence[tuple[int, int, int]], *, last: bool = False) -> list[int]:
        """Feed tokens with their positions and texts; returns the likeliest ids of all or last."""
        batch = self.batch
        batch.n_tokens = len(nodes)
        for i, (token, position, text) in enumerate(nodes):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = text, not last or i == len(nodes) - 1
        assert self.lib.llama_decode(self.context, batch) == 0
        found = []
        for i in range(len(nodes) - 1 if last else 0, len(nodes)):
            pointer = self.lib.llama_get_logits_ith(self.context, i)
            found.append(int(self.numpy.ctypeslib.as_array(pointer, (VOCABULARY,)).argmax()))
        return found

    def read_prompt(self, text: int) -> int:
        self.lib.llama_memory_seq_rm(self.memory, text, 0, -1)
        return self.feed([(token, at, text) for at, token in enumerate(PROMPT)], last=True)[0]

    def token(self, count: int, texts: int = 1) -> float:
        tokens = [self.read_prompt(text) for text in range(texts)]
        began = time.perf_counter()
        for at in range(len(PROMPT), len(PROMPT) + count):
            tokens = self.feed([(token, at, text) for text, token in enumerate(tokens)])
        return (time.perf_counter() - began) / count

    def rows(self, count: int) -> float:
        self.read_prompt(0)
        begin = len(PROMPT)

        def step() -> None:
            self.feed([(token, begin + at, 0) for at, token in enumerate(PROMPT[:ROWS])])
            self.lib.llama_memory_seq_rm(self.memory, 0, begin, -1)

        return repeat(step, count)


ENGINES: dict[str, type[Engine]] = {
    "spectool": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp
}  # fmt: skip


def repeat(step: Callable[[], object], count: int) -> float:
    step()
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def serve(engine: str, *options: str) -> None:
    """Answer each line `METHOD ARGUMENTS` of the standard input with a time."""
    path, threads, dtype, forward, how = options
    opened = ENGINES[engine](path, int(threads), dtype, forward, how)
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        print(getattr(opened, name)(*map(int, arguments)), flush=True)


class Column:
    """One engine with one model, in a process of its own.

    `how`: the activations of our products.
    """

    def __init__(
        self, name: str, path: Path, given: Any, dtype: str = "", forward: str = "", how: str = ""
    ) -> None:
        self.name, self.forward = name, forward
        files = [path] if path.is_file() else path.glob("*.safetensors")
        self.bytes = sum(file.stat().st_size for file in files)
        engine = name.split()[0]
        words = ["--serve", engine, str(path), str(given.threads), dtype, forward, how]
        found = os.pathsep.join([str(given.llama), str(Path(__file__).parent)])
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": found},
        )  # fmt: skip
        self.times: dict[str, list[float]] = {}

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended")
        return line.strip()

    def measure(self, step: str, *arguments: int) -> None:
        assert self.process.stdin is not None
        method = "token" if step == "batch" else step
        print(method, *arguments, file=self.process.stdin, flush=True)
        self.times.setdefault(step, []).append(1e3 * float(self.answer()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def row(self) -> dict[str, Any]:
        medians = {f"{step}_ms": statistics.median(each) for step, each in self.times.items()}
        return {"column": self.name, "forward": self.forward, "bytes": self.bytes, **medians}


@contextlib.contextmanager
def open_columns(work: Path, bits: str, given: Any) -> Iterator[list[Column]]:
    """Start the engines of one width of weights."""
    dtype, packed = "float32" if bits == "32" else "bfloat16", PACKED[bits] is not None
    columns: list[Column] = []
    try:
        for forward in given.forward:
            for how in given.activations if packed else ["auto"]:
                name = f"spectool {dtype}" + (f", {how} activations" if packed else "")
                path = work / (bits if packed else "dense")
                columns.append(Column(name, path, given, dtype, forward, how))
        for format in FORMATS[bits]:
            columns.append(Column(f"llama.cpp {format}", work / f"{format}.gguf", given))
        if not packed:
            columns.append(Column(f"transformers {dtype}", work / "dense", given, dtype))
        for column in columns:
            column.answer()
        yield columns
    finally:
        for column in columns:
            column.close()


def main() -> None:
    import peaks
    import record
    from busy import busy

    from spectool.machine import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=[*SHAPES, "narrow"])
    parser.add_argument("--bits", nargs="+", default=["16", "8", "4", "2", "1.6"], choices=PACKED)
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--forward", nargs="+", default=[""], help="default: as it is chosen")
    parser.add_argument("--activations", nargs="+", default=["auto"], help="of packed weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("build/step"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(given.llama))
    shapes = {name: shape for name, shape in SHAPES.items() if name in given.models}
    shapes |= NARROW if "narrow" in given.models else {}
    result: dict[str, Any] = {"benchmark": "step", "machine": describe(), "rows": []}
    if given.out is not None and given.out.exists():
        result["rows"] = json.loads(given.out.read_text())["rows"]
    read = peaks.measure(given.threads, 1 << 26).read
    result |= {"bytes_per_second": read, "shapes": {n: asdict(s) for n, s in shapes.items()}}
    result["llama_cpp_python"] = importlib.import_module("llama_cpp").__version__
    for name, shape in shapes.items():
        write_models(given.work, name, shape, given.bits)
        for bits in given.bits:
            with open_columns(given.work / name, bits, given) as columns:
                for others in given.busy:
                    print(f"{name}, {bits} bits, {others} busy processes", flush=True)
                    key = {"model": name, "bits": bits, "busy": others}
                    with busy(others):
                        rows = measure(columns, given, narrow=name in NARROW)
                    result["rows"] = [r for r in result["rows"] if not key.items() <= r.items()]
                    for row in rows:
                        row["floor_ms"] = 1e3 * row["bytes"] / read
                        print(row, flush=True)
                        result["rows"].append({**key, **row})
                    if given.out is not None:
                        record.write(given.out, result)
    for line in compare(result["rows"]):
        print(line)


def measure(columns: list[Column], given: Any, *, narrow: bool) -> list[dict[str, Any]]:
    """Let the columns take turns, a round to warm up and those that count; return their rows."""
    steps: dict[str, tuple[int, ...]] = {"token": (given.tokens,)}
    if not narrow:
        steps |= {"rows": (given.tokens,), "batch": (given.tokens // 2, ROWS)}
    for column in columns:
        column.times.clear()
    for _ in range(given.rounds + 1):
        for step, arguments in steps.items():
            for column in columns:
                column.measure(step, *arguments)
                # Threads of an engine that still spin would take part in the next one's time.
                time.sleep(0.01)
    for column in columns:
        column.times = {step: each[1:] for step, each in column.times.items()}
    return [column.row() for column in columns]


def compare(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines of ours beside the best of the others, model by model."""
    narrow = {}
    for row in rows:
        key = row["bits"], row["busy"], row["column"], row["forward"]
        narrow[row["model"], key] = row["token_ms"]
    for (model, key), milliseconds in narrow.items():
        if model == "narrow-24" and ("narrow-8", key) in narrow:
            slope = 1e3 * (milliseconds - narrow["narrow-8", key]) / 16
            yield f"{key[2]} {key[3]}, {key[0]} bits, {key[1]} busy: {slope:.0f} us a layer"
    for row in rows:
        if row["column"].startswith("spectool") and row["model"] in SHAPES:
            key = {name: row[name] for name in ("model", "bits", "busy")}
            others = [each for each in rows if key.items() <= each.items()]
            parts = []
            for step in ("token", "rows", "batch"):
                name = f"{step}_ms"
                for peer in ("llama.cpp", "transformers"):
                    best = min((r[name] for r in others if r["column"].startswith(peer)), default=0)
                    if best:
                        parts.append(f"{step} {best / row[name]:.2f}x {peer}")
            shown = f"{row['token_ms'] / row['floor_ms']:.2f}x reading, " + ", ".join(parts)
            gain = ROWS * row["token_ms"] / row["batch_ms"]
            name = f"{' '.join(map(str, key.values()))}, {row['column']} {row['forward']}"
            yield f"{name}: {shown}, batch {gain:.1f}x"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
