"""Opening a damaged checkpoint works or ends with a message of one line.

Slow: 2,000 mutants. SPECTOOL_FUZZ and SPECTOOL_FUZZ_SEED set how many, and from which seed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.errors import InputError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_tokenizer
from spectool.quantize import run
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN

MUTANTS = int(os.environ.get("SPECTOOL_FUZZ", "2000"))
SEED = os.environ.get("SPECTOOL_FUZZ_SEED", "0")

SECONDS = 30.0
# Address space that opening a tiny checkpoint may take, and growth of the resident set.
ROOM = 8 << 30
GROWTH = 1 << 30

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "qwen3_moe", "gemma3", "phi3", "mamba2", "opt")

NUMBERS = (0, 1, 2, 3, 7, 33, -1, -8, 1000, 50_000, 10**6, 10**9, 2**31, 10**12, 2**63, 10**30,
           0.5, -1.5, 1e-30, 1e300, float("nan"), float("inf"))  # fmt: skip
ODD = (None, True, False, "", "x", "0", "float32", "torch.int8", "full_attention", [], [0], [None],
       ["x"], [[]], [1, 2, 3], ["full_attention"] * 3, {}, {"a": 1}, {"0": {"0": []}},
       {"rope_type": "x"}, {"factor": -1}, "é\n\x00", "a" * 1000)  # fmt: skip
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "x", None, 3)
ADDED = ("quantization_config", "auto_map", "is_encoder_decoder", "is_decoder", "num_labels",
         "id2label", "torch_dtype", "dtype", "attn_implementation", "_attn_implementation",
         "text_config", "vision_config", "layer_types", "sliding_window", "tie_word_embeddings",
         "rope_scaling", "rope_parameters", "head_dim", "pruned_heads", "tokenizer_class",
         "problem_type", "architectures", "transformers_version", "max_position_embeddings",
         "num_key_value_heads", "num_experts", "experts_implementation", "return_dict",
         "cross_attention_hidden_size", "use_bidirectional_attention", "attention_chunk_size",
         "original_max_position_embeddings", "partial_rotary_factor", "_name_or_path",
         "chunk_size_feed_forward")  # fmt: skip


class TooLong(BaseException):
    pass


def value_for(rng: random.Random, old: Any) -> Any:
    """Draw a replacement of a value, often nearly valid."""
    kind = rng.random()
    if kind < 0.25 and isinstance(old, (int, float)) and not isinstance(old, bool):
        return rng.choice([old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old)])
    if kind < 0.4 and isinstance(old, list):
        return rng.choice([old[:-1], [*old, *old], [*old, None], old[::-1], dict(enumerate(old))])
    if kind < 0.4 and isinstance(old, str):
        return rng.choice([old.upper(), old + "x", old[:-1], [old], {"x": old}])
    return copy.deepcopy(rng.choice(NUMBERS if rng.random() < 0.5 else ODD))


def iterate_items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON value with each of its keys."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from iterate_items(part)
    elif isinstance(value, list):
        # Of long lists, such as merges, the ends.
        for index in [*range(min(len(value), 4)), *range(max(4, len(value) - 2), len(value))]:
            yield value, index
            yield from iterate_items(value[index])


def mutate(rng: random.Random, value: Any) -> Any:
    """Change one to three items of a JSON value in place, or replace all of it."""
    if rng.random() < 0.02:
        return copy.deepcopy(rng.choice(ODD))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(iterate_items(value))
        if not found:
            break
        holder, key = rng.choice(found)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = value_for(rng, holder[key])
    return value


def in_config(rng: random.Random, data: bytes) -> bytes:
    config = json.loads(data)
    kind = rng.random()
    if kind < 0.2:
        name = rng.choice(ADDED)
        config[name] = value_for(rng, config.get(name))
    elif kind < 0.3:
        config["rope_parameters"] = {
            "rope_type": rng.choice(ROPES),
            **{
                key: value_for(rng, 1.0)
                for key in ("rope_theta", "factor", "short_factor", "long_factor", "beta_fast",
                            "original_max_position_embeddings", "attention_factor")
                if rng.random() < 0.5
            },
        }  # fmt: skip
    elif kind < 0.37:
        config["model_type"] = rng.choice(sorted(CONFIG_MAPPING.keys()))
    else:
        config = mutate(rng, config)
    return json.dumps(config).encode()


def in_json(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(mutate(rng, json.loads(data))).encode()


def in_bytes(rng: random.Random, data: bytes) -> bytes:
    """Truncate the bytes, or change some of them."""
    kind = rng.random()
    if kind < 0.3:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def in_header(rng: random.Random, data: bytes) -> bytes:
    """Damage the header of a safetensors file, or the length before it."""
    length = int.from_bytes(data[:8], "little")
    raw = data[8 : 8 + length]
    kind = rng.random()
    if kind < 0.2:
        odd = rng.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])
        return odd.to_bytes(8, "little") + data[8:]
    if kind < 0.4:
        raw = in_bytes(rng, raw)
    else:
        header = json.loads(raw)
        if rng.random() < 0.5:
            # Whole, but of another architecture: a name or a shape is another.
            name = rng.choice([key for key in header if key != "__metadata__"])
            entry = header.pop(name)
            if rng.random() < 0.5:
                entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], []])
            header[rng.choice([name, name + "x", f"model.{name}", "x"])] = entry
        else:
            header = mutate(rng, header)
        raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


Mutator = Callable[[random.Random, bytes], bytes]
# By file, each with its share.
MUTATORS: list[tuple[str, Mutator, float]] = [
    ("config.json", in_config, 0.5),
    ("config.json", in_bytes, 0.03),
    ("model.safetensors.index.json", in_json, 0.07),
    ("model.safetensors.index.json", in_bytes, 0.02),
    ("model*.safetensors", in_header, 0.08),
    ("tokenizer.json", in_json, 0.08),
    ("tokenizer.json", in_bytes, 0.03),
    ("tokenizer_config.json", in_json, 0.08),
    ("tokenizer_config.json", in_bytes, 0.02),
    ("generation_config.json", in_json, 0.07),
    ("generation_config.json", in_bytes, 0.02),
]


def open_all(path: Path) -> tuple[bool, list[BaseException]]:
    """Open a checkpoint in every way; returns whether any was refused, and unexpected errors."""
    refused, wrong = False, list[BaseException]()

    def attempt(open_one: Callable[[], Any]) -> Any:
        nonlocal refused
        try:
            return open_one()
        except InputError as error:
            text, refused = str(error), True
            if not text.strip() or len(text) > 2000:
                wrong.append(AssertionError(f"no message to show: {text!r}"))
        except (Exception, TooLong) as error:
            wrong.append(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            wrong.append(error)
        return None

    opened = attempt(lambda: open_checkpoint(path))
    if opened is not None:
        attempt(lambda: opened.layout.context)
        attempt(lambda: Architecture(opened))
    model = attempt(lambda: spectool.load(path))
    tokenizer = attempt(lambda: load_tokenizer(open_checkpoint(path)))
    if model is not None and tokenizer is not None:
        attempt(lambda: Runner(model, tokenizer=tokenizer).end_ids())
    return refused, wrong


@contextmanager
def limits() -> Iterator[None]:
    """Limit the address space, and the time of each mutant."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> list[Path]:
    """Make checkpoints to damage: dense ones, in one file and in several, and a packed one."""
    found = [checkpoint(name) for name in FAMILIES]
    found.append(checkpoint("llama", max_shard_size="20KB"))
    long = Path(shutil.copytree(checkpoint("phi3"), tmp_path_factory.mktemp("longrope") / "model"))
    config = json.loads((long / "config.json").read_bytes())
    (long / "config.json").write_text(json.dumps({**config, "rope_parameters": LONGROPE}))
    found.append(long)
    packed = tmp_path_factory.mktemp("packed") / "artifact"
    run.quantize(
        open_checkpoint(found[0]),
        packed,
        QuantizeJob(method="rtn", config=RTN.Config(group_size=16)),
    )
    return [*found, packed]


def mutant(rng: random.Random, source: Path) -> dict[Path, bytes] | None:
    """Damage a file of a checkpoint; None if the checkpoint has no such file."""
    pattern, damage, _ = rng.choices(MUTATORS, [share for *_, share in MUTATORS])[0]
    files = sorted(source.glob(pattern))
    if not files and "model" in pattern:
        files = sorted(source.glob(pattern.replace("model", "packed")))
    if not files:
        return None
    file = rng.choice(files)
    data = file.read_bytes()
    changed = damage(rng, data)
    return None if changed == data else {file: changed}


def replace(files: dict[Path, bytes]) -> None:
    """Replace files by new ones, since the old ones may still be mapped into memory."""
    for file, data in files.items():
        file.unlink()
        file.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_checkpoint_opens_or_costs_one_line(
    sources: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failures: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    copies = [Path(shutil.copytree(source, tmp_path / str(i))) for i, source in enumerate(sources)]
    number = done = 0
    with limits():
        while done < MUTANTS:
            number += 1
            rng = random.Random(f"{SEED}/{number}")
            source = rng.choice(copies)
            damaged = mutant(rng, source)
            if damaged is None:
                continue
            done += 1
            whole = {file: file.read_bytes() for file in damaged}
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            replace(damaged)
            refused, wrong = open_all(source)
            signal.setitimer(signal.ITIMER_REAL, 0)
            replace(whole)
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
            if grown > GROWTH:
                wrong.append(AssertionError(f"{grown / 1e9:.1f} GB more"))
            outcomes["wrong" if wrong else "refused" if refused else "opened"] += 1
            for error in wrong:
                frames = traceback.extract_tb(error.__traceback__)
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:4])
                key = f"{type(error).__name__} at {where}"
                failures[key] += 1
                (file,) = damaged
                examples.setdefault(key, f"mutant {number} ({source.name}/{file.name}): {error}")
    with capfd.disabled():
        print(f"\n{dict(outcomes)} of {done} mutants, seed {SEED}")
    listed = [f"{count} x {key}: {examples[key][:300]}" for key, count in failures.most_common()]
    assert not listed, "\n".join(listed)
