"""Measure loss against stored bits, for every quantization method on given checkpoints and texts.

    python benchmarks/fidelity.py texts SHARED FOLDER
    python benchmarks/fidelity.py measure MODEL CALIBRATION WINDOW TEXT ... --out FILE [--only NAME]
    python benchmarks/fidelity.py report FILE ... [--plot FILE]

`texts` writes the texts of the published tables. `measure` quantizes the checkpoint with each
method, calibrated on 64 sequences of 256 tokens of CALIBRATION (with two seeds for methods that use
them), and compares the result with the original in float32 on each TEXT, in windows that start with
the BOS token. Results that FILE already holds are not measured again. `report` prints the tables
and each method's distance from the curve of the baselines, with intervals by a paired bootstrap
over windows.

Shapes: S windows of a text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from record import write
from torch import Tensor

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.template import encode
from spectool.data.text import read_text
from spectool.data.windows import Batch, Windows, cut
from spectool.errors import UsageError
from spectool.evaluate.fidelity import LogProbsReference, score
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.examples.stdlib import read_documents
from spectool.machine import describe
from spectool.methods import import_method
from spectool.model.loading import load_tokenizer
from spectool.picture import COLOURS, LINE, MARKERS, MUTED, make_figure, save, style
from spectool.quantize.budget import list_widths
from spectool.quantize.job import Budget, QuantizeJob
from spectool.quantize.ledger import measure as count_bits
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.run import quantize

Request = dict[str, Any]

BASELINES = ("rtn", "hqq", "gptq", "nf4", "int8")
GROUPS = (32, 64, 128, 0)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("jlcm", {"bits": 2, "epochs": 4}),
    ("scalar", {"bits": 2.0}),
    ("ptq161", {"epochs": 4}),
    ("ptq161 reshaped", {"epochs": 4}),
    *(("gptq", {"bits": b, "group_size": g}) for b in (2, 3, 4) for g in GROUPS),
    *(("gptq mixed", {"budget": b}) for b in (2.25, 2.5, 3.0, 3.5)),
    ("olive", {"bits": 4}),
    *(("olive-activations", {"bits": b}) for b in (4, 8)),
    ("nf4", {}),
    ("int8", {}),
    *(("rtn", {"bits": b, "group_size": g}) for b in (2, 3, 4) for g in GROUPS),
    *(("hqq", {"bits": b, "group_size": g}) for b in (2, 3, 4) for g in GROUPS),
    *(("jlcm", {"bits": b, "epochs": 4}) for b in (3, 4)),
    ("scalar", {"bits": 3.0}),
]
SAMPLES, SEQ_LEN = 64, 256
# Number of characters of each text.
LENGTH = 60000
SEEDS = (0, 1)
PREPROCESS = {"steps": 200, "rate": 3e-4, "batch_size": 4}
DRAWS = 2000


def write_texts(shared: Path, folder: Path) -> None:
    """Write calibration texts of the kinds that the models were trained on, and held-out texts."""
    data = shared / "data"

    def lines(name: str) -> list[Any]:
        with gzip.open(data / name, "rt") as file:
            return [json.loads(line) for line in file]

    def chat(rows: list[Any]) -> list[str]:
        return [f"<|user|>{r['question']}<|end|><|assistant|>{r['answer']}<|end|>" for r in rows]

    with gzip.open(data / "text/tinystories_valid.txt.gz", "rt") as file:
        stories = file.read().replace("\n\n", "\n")
    with lzma.open(data / "text/books_heldout.jsonl.xz", "rt") as file:
        book = json.loads(file.readline())["text"]
    train_stories = [row["text"] for row in lines("text/tinystories_train.jsonl.gz")[:600]]
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [p.read_text() for n in ("json", "asyncio") for p in sorted((library / n).glob("*.py"))]
    sources = [document for document in read_documents() if not document.held_out]
    random.Random(0).shuffle(sources)
    texts = {
        "stories": stories[:LENGTH],
        "arithmetic": "".join(chat(lines("prompts/gsm8k_test.jsonl.gz")))[:LENGTH],
        "book": book[:LENGTH],
        "held-code": "\n".join(d.text for d in read_documents() if d.held_out)[:LENGTH],
        "calibration": "\n".join(
            [*train_stories, *chat(lines("prompts/gsm8k_train.jsonl.gz")[:600]), *code]
        ),
        "calibration-stories": "\n".join(train_stories),
        "calibration-code": "\n".join(d.text for d in sources)[:1500000],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


class Original:
    """Log-probabilities of the original model on a text, computed once."""

    def __init__(self, windows: Windows, probs: Callable[[Batch], Tensor], vocabulary: int) -> None:
        self.log_probs = {_key(b): probs(b) for b in windows.batches(vocabulary)}

    def __call__(self, batch: Batch) -> Tensor:
        return self.log_probs[_key(batch)]


def _key(batch: Batch) -> tuple[int, int]:
    return batch.group, batch.rows.start


def measure(model: str, calibration: str, window: int, texts: Sequence[str], given: Any) -> None:
    """Measure every method on one checkpoint and add the rows to the file."""
    original = spectool.load(model, dtype="float32")
    vocabulary = original.config.vocab_size
    tokenizer = load_tokenizer(open_checkpoint(model))
    sides = {}
    for text in texts:
        ids = encode(tokenizer, read_text([text], tokenizer))
        windows = cut(ids, length=window, bos=tokenizer.bos_token_id)
        sides[Path(text).stem] = windows, Original(windows, ResidentLogProbs(original), vocabulary)
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    done = {_identity(row) for row in rows}
    if not done:
        rows += _score(sides, ResidentLogProbs(original), vocabulary, {"method": "original"})
    for name, options in METHODS:
        method, _, variant = name.partition(" ")
        kind = import_method(method, "quantizer")
        seeds = SEEDS if kind().needs_calibration else SEEDS[:1]
        for seed in seeds if name in (given.only or [name]) else ():
            record = {"method": name, "options": options, "seed": seed}
            if _identity(record) in done:
                continue
            config = kind.Config(**{k: value for k, value in options.items() if k != "budget"})
            quantizer, budget = kind(config), None
            if variant == "mixed":
                budget = Budget(options["budget"], list_widths(quantizer, options["budget"]))
            job = QuantizeJob(
                method=method,
                config=config,
                budget=budget,
                calibration=(calibration,),
                samples=SAMPLES,
                seq_len=SEQ_LEN,
                seed=seed,
                preprocess=Preprocess(text=[calibration], **PREPROCESS)
                if variant == "reshaped"
                else None,
            )
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                resident = _reset_peak()
                began = time.perf_counter()
                try:
                    quantize(open_checkpoint(model), out, job)
                except UsageError as error:
                    # The padding of small matrices alone may take more than a budget.
                    print(name, options, error, flush=True)
                    continue
                record["seconds"] = time.perf_counter() - began
                record["bytes_needed"] = _peak() - resident
                ledger = count_bits(read_layout(out))
                record |= {"bits_linears": ledger.linears, "bits_file": ledger.file}
                packed = spectool.load(out, dtype="float32", runtime="dense")
                rows += _score(sides, ResidentLogProbs(packed), vocabulary, record)
            header = {"benchmark": "fidelity", "machine": describe(), "model": Path(model).name}
            counts = {text: windows.counts().tolist() for text, (windows, _) in sides.items()}
            write(given.out, {**header, "window_tokens": counts, "rows": rows})
            print(name, options, seed, f"{record['seconds']:.0f} s", flush=True)


def _identity(row: Request) -> str:
    return json.dumps([row["method"], row.get("options"), row.get("seed")])


def _reset_peak() -> int:
    """Reset the peak of resident memory and return the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return 1024 * int(status.split()[0])


def _score(
    sides: dict[str, tuple[Windows, Original]],
    probs: Callable[[Batch], Tensor],
    vocabulary: int,
    record: Request,
) -> list[Request]:
    """Score a model on each text; return a row per text, which extends `record`."""
    rows = []
    for text, (windows, original) in sides.items():
        scores = score(windows, probs, vocabulary, reference=LogProbsReference(original))
        nll = [
            float(part.double().sum())
            for part in scores.figures["nll"].split(windows.counts().tolist())
        ]
        rows.append(
            {
                **record,
                "text": text,
                "perplexity": scores.perplexity,
                "kl": scores.mean("kl"),
                "top1_agreement": scores.mean("same_top"),
                "window_nll": [round(value, 3) for value in nll],
            }
        )
    return rows


class Point:
    """Result of a method with its options on one text: the mean over seeds.

    `window_tokens` are the numbers of scored tokens of the text's windows.
    """

    def __init__(self, rows: Sequence[Request], window_tokens: Sequence[int]) -> None:
        self.rows = rows
        self.method = rows[0]["method"]
        self.options = rows[0].get("options") or {}
        self.bits = rows[0].get("bits_linears", 16.0)
        self.tokens_S = torch.tensor(window_tokens, dtype=torch.float64)
        self.nll_S = torch.tensor([row["window_nll"] for row in rows], dtype=torch.float64).mean(0)
        self.nll = float(self.nll_S.sum() / self.tokens_S.sum())

    def mean(self, key: str) -> float:
        """Average a field of the rows."""
        return sum(row[key] for row in self.rows) / len(self.rows)

    @property
    def name(self) -> str:
        options = [f"{k.replace('group_size', 'g').replace('bits', 'b')}{v}"
                for k, v in self.options.items() if k != "epochs"]  # fmt: skip
        return " ".join([f"`{self.method}`", *options])


def interval(difference_S: Tensor, tokens_S: Tensor) -> tuple[float, float, float]:
    """Return the ratio of perplexities for differences of the windows' NLL, and its 95% interval.

    The interval is bootstrapped over windows.
    """
    generator = torch.Generator().manual_seed(0)
    size = len(tokens_S)
    drawn_DS = torch.randint(size, (DRAWS, size), generator=generator)
    means_D = difference_S[drawn_DS].sum(1) / tokens_S[drawn_DS].sum(1)
    low, high = means_D.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(difference_S.sum() / tokens_S.sum())
    return math.exp(mean), math.exp(low), math.exp(high)


def hull(points: Sequence[Point]) -> list[Point]:
    """Return the lower convex hull of the points' NLL over bits, by increasing bits."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.nll)):
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], point):
            kept.pop()
        if not kept or (point.bits > kept[-1].bits and point.nll < kept[-1].nll):
            kept.append(point)
    return kept


def _slope(first: Point, second: Point) -> float:
    return (second.nll - first.nll) / (second.bits - first.bits)


def from_curve(point: Point, curve: Sequence[Point]) -> tuple[float, float, float]:
    """Return the ratio of the perplexity to the curve's at the same bits, with its interval.

    Left of its first point the curve is extended straight with its first slope. A convex curve
    would rise more, so a point below the extension is also below the curve.
    """
    right = next((i for i in range(1, len(curve)) if curve[i].bits >= point.bits), len(curve) - 1)
    first, second = curve[right - 1], curve[right]
    share = (point.bits - first.bits) / (second.bits - first.bits)
    curve_S = first.nll_S + min(share, 1.0) * (second.nll_S - first.nll_S)
    return interval(point.nll_S - curve_S, point.tokens_S)


def read_points(file: Path) -> tuple[str, dict[str, list[Point]]]:
    """Read a result file: the model's name, and the points by text."""
    result = json.loads(file.read_text())
    grouped: dict[str, dict[str, list[Request]]] = {}
    for row in result["rows"]:
        key = json.dumps([row["method"], row.get("options")])
        grouped.setdefault(row["text"], {}).setdefault(key, []).append(row)
    counts = result["window_tokens"]
    points = {
        text: [Point(rows, counts[text]) for rows in each.values()]
        for text, each in grouped.items()
    }
    return result["model"], points


def report(files: Sequence[Path], plot: Path | None) -> None:
    """Print the tables of result files, and draw them."""
    panels = {}
    for file in files:
        model, by_text = read_points(file)
        for text, points in by_text.items():
            original = next(point for point in points if point.method == "original")
            curve = hull([point for point in points if point.method in BASELINES])
            panels[model, text] = points, original, curve
            print(f"\n### {model}, {text}\n")
            print(
                f"{int(original.tokens_S.sum()):,} tokens; the original's perplexity is "
                f"{math.exp(original.nll):.3f}.\n"
            )
            print(
                "| method | bits, linears | file | perplexity | over the original | between seeds "
                "| over the curve | KL | top-1 | s | MB |"
            )
            print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
            for point in sorted(points, key=lambda p: p.bits):
                if point is not original:
                    print(_line(point, original, curve))
    if plot:
        draw(panels, plot)


def _line(point: Point, original: Point, curve: Sequence[Point]) -> str:
    over_original = interval(point.nll_S - original.nll_S, point.tokens_S)
    each = [row["perplexity"] for row in point.rows]
    over_curve = "" if point.method in BASELINES else "{:.3f} ({:.3f}-{:.3f})".format(
        *from_curve(point, curve)
    )  # fmt: skip
    return (
        f"| {point.name} | {point.bits:.3f} | {point.mean('bits_file'):.2f} "
        f"| {math.exp(point.nll):.3f} "
        f"| {over_original[0]:.3f} ({over_original[1]:.3f}-{over_original[2]:.3f}) "
        f"| {f'{(max(each) - min(each)) / min(each):.2%}' if len(each) > 1 else ''} | {over_curve} "
        f"| {point.mean('kl'):.4f} | {point.mean('top1_agreement'):.1%} "
        f"| {point.mean('seconds'):.0f} | {point.mean('bytes_needed') / 1e6:.0f} |"
    )


def draw(panels: dict[tuple[str, str], Any], path: Path) -> None:
    """Draw a panel per model and text: perplexity against stored bits of the linears."""
    columns = 3
    lines = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for name, _ in METHODS))
    with style():
        figure = make_figure(5 * columns, 3.6 * lines)
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, ((model, text), (points, original, curve)) in zip(
            axes, panels.items(), strict=False
        ):
            hull_bits, hull_values = [p.bits for p in curve], [math.exp(p.nll) for p in curve]
            axis.plot(hull_bits, hull_values, color=LINE, lw=5)
            for number, method in enumerate(names):
                pairs = sorted((p.bits, math.exp(p.nll)) for p in points if p.method == method)
                bits, perplexities = [bits for bits, _ in pairs], [value for _, value in pairs]
                # The second round of colours has other markers, and dashes.
                look = {
                    "color": COLOURS[number % len(COLOURS)],
                    "linestyle": "-" if number < len(COLOURS) else "--",
                    "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                }
                axis.plot(bits, perplexities, markersize=3.5, lw=0.9, label=method, **look)
            reference = math.exp(original.nll)
            axis.axhline(reference, color=MUTED, linewidth=0.8)
            axis.set(title=f"{model}, {text}", xlabel="stored bits per weight", ylabel="perplexity")
            axis.set(ylim=(0.95 * reference, 1.3 * reference), xlim=(1.5, 5.0))
        axes[0].legend(ncols=2)
        save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("calibration")
    measuring.add_argument("window", type=int)
    measuring.add_argument("texts", nargs="+")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--only", nargs="+")
    making = actions.add_parser("texts")
    making.add_argument("shared", type=Path)
    making.add_argument("folder", type=Path)
    reporting = actions.add_parser("report")
    reporting.add_argument("files", nargs="+", type=Path)
    reporting.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.action == "report":
        report(given.files, given.plot)
        return
    if given.action == "texts":
        write_texts(given.shared, given.folder)
        return
    transformers.logging.disable_progress_bar()
    measure(given.model, given.calibration, given.window, given.texts, given)


if __name__ == "__main__":
    main()
