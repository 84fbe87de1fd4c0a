"""Damaged checkpoints: whatever their files say, opening them works or costs one line.

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

from spectool.checkpoint.headers import read_layout
from spectool.decode.generate import Runner
from spectool.errors import InputError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model, load_tokenizer
from spectool.quantize import run
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


def value_for(chance: random.Random, old: Any) -> Any:
    """Something else in the place of a value, often nearly right."""
    kind = chance.random()
    if kind < 0.25 and isinstance(old, (int, float)) and not isinstance(old, bool):
        return chance.choice([old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old)])
    if kind < 0.4 and isinstance(old, list):
        return chance.choice(
            [old[:-1], [*old, *old], [*old, None], old[::-1], dict(enumerate(old))]
        )
    if kind < 0.4 and isinstance(old, str):
        return chance.choice([old.upper(), old + "x", old[:-1], [old], {"x": old}])
    return copy.deepcopy(chance.choice(NUMBERS if chance.random() < 0.5 else ODD))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from places(part)
    elif isinstance(value, list):
        # Of long lists, such as merges, the ends.
        for index in [*range(min(len(value), 4)), *range(max(4, len(value) - 2), len(value))]:
            yield value, index
            yield from places(value[index])


def mutate(chance: random.Random, value: Any) -> Any:
    """Change one to three places of a JSON value, in place; or all of it."""
    if chance.random() < 0.02:
        return copy.deepcopy(chance.choice(ODD))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            break
        holder, key = chance.choice(found)
        if chance.random() < 0.2:
            del holder[key]
        else:
            holder[key] = value_for(chance, holder[key])
    return value


def in_config(chance: random.Random, data: bytes) -> bytes:
    config = json.loads(data)
    kind = chance.random()
    if kind < 0.2:
        name = chance.choice(ADDED)
        config[name] = value_for(chance, config.get(name))
    elif kind < 0.3:
        config["rope_parameters"] = {
            "rope_type": chance.choice(ROPES),
            **{
                key: value_for(chance, 1.0)
                for key in ("rope_theta", "factor", "short_factor", "long_factor", "beta_fast",
                            "original_max_position_embeddings", "attention_factor")
                if chance.random() < 0.5
            },
        }  # fmt: skip
    elif kind < 0.37:
        config["model_type"] = chance.choice(sorted(CONFIG_MAPPING.keys()))
    else:
        config = mutate(chance, config)
    return json.dumps(config).encode()


def in_json(chance: random.Random, data: bytes) -> bytes:
    return json.dumps(mutate(chance, json.loads(data))).encode()


def in_bytes(chance: random.Random, data: bytes) -> bytes:
    """Cut, emptied, or some bytes changed."""
    kind = chance.random()
    if kind < 0.3:
        return data[: chance.randrange(len(data) + 1)]
    changed = bytearray(data)
    for _ in range(chance.choice([1, 2, 8])):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def in_header(chance: random.Random, data: bytes) -> bytes:
    """The header of a safetensors file, or the length before it."""
    length = int.from_bytes(data[:8], "little")
    raw = data[8 : 8 + length]
    kind = chance.random()
    if kind < 0.2:
        odd = chance.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])
        return odd.to_bytes(8, "little") + data[8:]
    if kind < 0.4:
        raw = in_bytes(chance, raw)
    else:
        header = json.loads(raw)
        if chance.random() < 0.5:
            # Whole, but of another architecture: a name or a shape is another.
            name = chance.choice([key for key in header if key != "__metadata__"])
            entry = header.pop(name)
            if chance.random() < 0.5:
                entry["shape"] = chance.choice([entry["shape"][::-1], [*entry["shape"], 1], []])
            header[chance.choice([name, name + "x", f"model.{name}", "x"])] = entry
        else:
            header = mutate(chance, header)
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
    """Open a checkpoint in all ways there are: whether any was refused, and what went wrong."""
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

    layout = attempt(lambda: read_layout(path))
    if layout is not None:
        attempt(lambda: layout.context)
        attempt(lambda: Architecture(layout))
    model = attempt(lambda: load_model(path))
    tokenizer = attempt(lambda: load_tokenizer(path))
    if model is not None and tokenizer is not None:
        attempt(lambda: Runner(model, tokenizer=tokenizer).end_ids())
    return refused, wrong


@contextmanager
def limits() -> Iterator[None]:
    """So much address space, and so much time for each mutant."""

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
    """Checkpoints to damage: dense ones, in one file and in several, and a packed one."""
    found = [checkpoint(name) for name in FAMILIES]
    found.append(checkpoint("llama", max_shard_size="20KB"))
    long = Path(shutil.copytree(checkpoint("phi3"), tmp_path_factory.mktemp("longrope") / "model"))
    config = json.loads((long / "config.json").read_bytes())
    (long / "config.json").write_text(json.dumps({**config, "rope_parameters": LONGROPE}))
    found.append(long)
    packed = tmp_path_factory.mktemp("packed") / "artifact"
    run.quantize(found[0], packed, run.Job(method="rtn", config=RTN.Config(group_size=16)))
    return [*found, packed]


def mutant(chance: random.Random, source: Path) -> dict[Path, bytes] | None:
    """The damaged file of a checkpoint; None where there is no such file."""
    pattern, damage, _ = chance.choices(MUTATORS, [share for *_, share in MUTATORS])[0]
    files = sorted(source.glob(pattern))
    if not files and "model" in pattern:
        files = sorted(source.glob(pattern.replace("model", "packed")))
    if not files:
        return None
    file = chance.choice(files)
    data = file.read_bytes()
    changed = damage(chance, data)
    return None if changed == data else {file: changed}


def replace(files: dict[Path, bytes]) -> None:
    """Put new files in the place of others, which may still be mapped into memory."""
    for file, data in files.items():
        file.unlink()
        file.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_checkpoint_opens_or_costs_one_line(
    sources: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    copies = [Path(shutil.copytree(source, tmp_path / str(i))) for i, source in enumerate(sources)]
    number = done = 0
    with limits():
        while done < MUTANTS:
            number += 1
            chance = random.Random(f"{SEED}/{number}")
            source = chance.choice(copies)
            damaged = mutant(chance, source)
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
                places[key] += 1
                (file,) = damaged
                examples.setdefault(key, f"mutant {number} ({source.name}/{file.name}): {error}")
    with capfd.disabled():
        print(f"\n{dict(outcomes)} of {done} mutants, seed {SEED}")
    listed = [f"{count} x {key}: {examples[key][:300]}" for key, count in places.most_common()]
    assert not listed, "\n".join(listed)
