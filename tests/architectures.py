"""Every architecture that transformers' causal mapping knows, through spectool's public functions.

    python tests/architectures.py [--only NAME …] [--workers N] [--fresh] [--out FILE]

A tiny random model of each entry (`shrunken.py`) is saved and then run whole, block by block,
packed, in a batch, with every drafter that needs no training, and with heads taught for a few
steps. Each check ends as `works`, as `refused` with the sentence that a user would read, or as a
`FAULT`: another exception, numbers that are not transformers' own, or a refusal that comes after
work began. Every entry runs in a process of its own under limits of time and memory; what is done
stands in `build/architectures/`, one line an entry, and is not done again. The collected
result goes to `benchmarks/results/`, from where `docs/make_architectures.py` makes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Before anything that reads them.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import shrunken
import torch
import transformers
from architecture_checks import CHECKS, LENGTH, SEQUENCES, Subject, brief, forward, judge, tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parent.parent
LINES = ROOT / "build/architectures"
RESULTS = ROOT / "benchmarks/results"

SECONDS, BYTES = 300, 6 << 30

# Types whose default configuration is no causal model, and what makes it one.
DECODERS = {"xlm": {"causal": True}}
# Those of which `is_decoder` changes nothing.
CAUSAL_ANYWAY = {"gpt_neox", "gpt_neox_japanese"}

Tell = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model type, and what its configuration gets besides."""

    model_type: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = [f"{key}={json.dumps(value)}" for key, value in self.extra.items()]
        return ", ".join([self.model_type, *more])


def entries() -> list[Entry]:
    """All entries of the mapping; types that are no causal model by default also as one."""
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found.append(Entry(model_type))
        extra = DECODERS.get(model_type)
        with contextlib.suppress(Exception):
            config = CONFIG_MAPPING[model_type]()
            undecided = (
                getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder
            )
            if undecided and model_type not in CAUSAL_ANYWAY:
                extra = {"is_decoder": True}
        if extra is not None:
            found.append(Entry(model_type, extra))
    return found


def doubles(wanted: list[Entry]) -> dict[str, str]:
    """Entries whose classes equal an earlier one's, by name."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for entry in wanted:
        config = CONFIG_MAPPING[entry.model_type]
        with contextlib.suppress(Exception):
            key = (
                config,
                AutoModelForCausalLM._model_mapping[config],
                entry.name.partition(",")[2],
            )
            if first.setdefault(key, entry.name) != entry.name:
                same[entry.name] = first[key]
    return same


def examine(entry: Entry, scratch: Path, tell: Tell) -> None:
    """Build the entry's model and run every check on it."""
    place = scratch / "model"
    try:
        config = shrunken.tiny_config(entry.model_type, **entry.extra)
        model = shrunken.build(config)
        tell("class", type(model).__name__)
        model.save_pretrained(place)
        if type(model.config) not in AutoModelForCausalLM._model_mapping:
            # The text's part of a model with other parts, which transformers opens as a whole.
            config.save_pretrained(place)
        tokenizer().save_pretrained(place)
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(3, 500, (SEQUENCES, LENGTH), generator=generator)
        subject = Subject(place, scratch, theirs, ids_BL)
        # What is no fixed point of transformers' own saving and loading says nothing about ours.
        if not torch.allclose(forward(model, ids_BL), subject.logits_BLV, atol=1e-3):
            tell("notes", ["what transformers saves it does not load as the same model"])
        begin_BLV = forward(theirs, ids_BL[:, : LENGTH // 2])
        whole_BLV = subject.logits_BLV[:, : LENGTH // 2]
        causal = bool((begin_BLV - whole_BLV).abs().max() < 1e-3 * whole_BLV.abs().max())
    except Exception as error:
        tell("not built", brief(error))
        return
    tell("causal", causal)
    for name, check in CHECKS.items():
        tell("running", name)
        began = time.monotonic()
        outcome = judge(check, subject, causal=causal)
        tell(name, outcome | {"seconds": round(time.monotonic() - began, 1)})
    if subject.notes:
        tell("notes", subject.notes)


def child(entry: Entry, pipe: Connection) -> None:
    """Examine an entry under the limits; what is found out goes through the pipe."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with tempfile.TemporaryDirectory(prefix="spectool-architecture-") as scratch:
        examine(entry, Path(scratch), lambda key, value: pipe.send((key, value)))
    pipe.send(("done", True))


def run(wanted: list[Entry], file: Path, workers: int) -> None:
    """Examine entries, some at a time, and append a line for each."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), {}
    torch.set_num_threads(1)
    tokenizer()
    while waiting or running:
        while waiting and len(running) < workers:
            entry = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(entry, theirs))
            process.start()
            theirs.close()
            running[ours] = (process, time.monotonic(), {"entry": entry.name})
        for pipe in wait(list(running), timeout=1.0):
            record = running[pipe][2]
            try:
                key, value = pipe.recv()
            except EOFError:
                key, value = "ended", True
            if key in CHECKS:
                record.setdefault("checks", {})[key] = value
            elif key == "notes":
                record.setdefault("notes", []).extend(value)
            else:
                record[key] = value
        for pipe, (process, began, record) in list(running.items()):
            late = time.monotonic() - began > SECONDS
            if not (late or "ended" in record or "done" in record):
                continue
            if late:
                process.kill()
            process.join()
            del running[pipe]
            record["seconds"] = round(time.monotonic() - began, 1)
            keep(record, file, f"took more than {SECONDS} s" if late else process.exitcode)


def keep(record: dict[str, Any], file: Path, end: Any) -> None:
    """Append an entry's line; what was running when its process ended is a fault."""
    running = record.pop("running", None)
    record.pop("ended", None)
    if not record.pop("done", False):
        why = end if isinstance(end, str) else f"the process ended with {end}"
        if running is None:
            record["not built"] = why
        else:
            record.setdefault("checks", {})[running] = {"result": "FAULT", "why": why}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    checks = record.get("checks", {})
    found = [check["result"] for check in checks.values()]
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in ("works", "refused", "FAULT"))
    print(f"{record['entry']:36} {record['seconds']:6.1f} s  ", end="")
    print(f"not built: {record['not built']}" if "not built" in record else counts, flush=True)
    for name, check in checks.items():
        if check["result"] == "FAULT":
            print(f"    {name}: {check['why']}", flush=True)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by entry, the last one of each."""
    if not file.exists():
        return {}
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return {row["entry"]: row for row in rows}


def collect(file: Path, out: Path) -> None:
    """The result of all entries, in the mapping's order, without what changes from run to run."""
    wanted, found = entries(), read(file)
    same_as, rows = doubles(wanted), []
    for entry in wanted:
        if entry.name in same_as:
            rows.append({"entry": entry.name, "same as": same_as[entry.name]})
        elif entry.name in found:
            rows.append({k: v for k, v in found[entry.name].items() if k != "seconds"})
    for row in rows:
        for check in row.get("checks", {}).values():
            for key in ("seconds", "trace", "difference"):
                check.pop(key, None)
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python tests/architectures.py",
        "entries": rows,
    }
    lines = ",\n".join(map(json.dumps, result.pop("entries")))
    head = json.dumps(result, indent=1).removesuffix("\n}")
    out.write_text(f'{head},\n "entries": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries, or model types")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="run again what has been run")
    parser.add_argument("--lines", type=Path, help="where the lines of entries go")
    parser.add_argument("--out", type=Path, help="where the collected result goes")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    version = ".".join(transformers.__version__.split(".")[:2])
    LINES.mkdir(parents=True, exist_ok=True)
    # Kernels are compiled once for all entries, and nothing is kept in the user's folders.
    os.environ["XDG_CACHE_HOME"] = str(LINES / "cache")
    file = given.lines or LINES / f"transformers-{version}.jsonl"
    wanted = entries()
    if given.only:
        wanted = [e for e in wanted if e.name in given.only or e.model_type in given.only]
    done = set() if given.fresh else set(read(file))
    skipped = set(doubles(wanted)) | done
    run([entry for entry in wanted if entry.name not in skipped], file, given.workers)
    collect(file, given.out or RESULTS / f"architectures-transformers-{version}.json")


if __name__ == "__main__":
    main()
