"""Packing: resuming with the same bytes, memory of one block, buffers in files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError, SpectoolError, UsageError
from spectool.model.blocks import BlockStream
from spectool.quantize import stream
from spectool.quantize.budget import list_widths
from spectool.quantize.job import Budget, QuantizeJob
from spectool.quantize.methods.ptq161 import PTQ161
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.pack import Packing
from spectool.quantize.report import QuantizeReport
from spectool.quantize.run import quantize
from spectool.report import Reporter

from ..conftest import contents

Checkpoints = Callable[..., Path]

LAYERS = {"num_hidden_layers": 5}


def job(text_file: str | None = None, **changes: Any) -> QuantizeJob:
    """Make a job of round to nearest; with a text, both streams run and errors are measured."""
    options = {"method": "rtn", "config": RTN.Config(bits=3), "samples": 5, "seq_len": 24}
    return QuantizeJob(**{**options, "calibration": [text_file] if text_file else [], **changes})


def fitted_job(**changes: Any) -> QuantizeJob:
    """Make a job of a method that fits whole blocks, on the built-in text."""
    config = PTQ161.Config(epochs=1)
    return job(method="ptq161", config=config, **{"samples": 3, **changes})


def die(
    run: Callable[[], object],
    after: float,
    number: int = signal.SIGKILL,
    ready: Callable[[], bool] = lambda: True,
) -> int:
    """Run a forked process that gets a signal `after` seconds past `ready`; return its status."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    while not ready():
        time.sleep(0.005)
    time.sleep(after)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


def slowed(source: Path, out: Path, asked: QuantizeJob) -> None:
    """Quantize at a hundredth of a second per matrix, so that signals arrive midway."""
    original = RTN.pack

    def pack(*arguments: Any) -> Any:
        time.sleep(0.01)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RTN, "pack", pack)
        quantize(open_checkpoint(source), out, asked)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["data-free", "calibrated", "fitted"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str, kind: str
) -> None:
    source = checkpoint("llama", **LAYERS)
    asked = fitted_job() if kind == "fitted" else job(text_file if kind == "calibrated" else None)
    # A fitted block takes longer: some blocks are whole when the signal comes.
    longest = 0.6 if kind == "fitted" else 0.3
    want = quantize(open_checkpoint(source), tmp_path / "undisturbed", asked)
    out, moments = tmp_path / "out", random.Random(0)
    killed = 0
    for _ in range(6):
        if out.exists():
            break
        status = die(lambda: slowed(source, out, asked), moments.uniform(0.05, longest))
        killed += os.WIFSIGNALED(status)
        assert status == 0 or os.WIFSIGNALED(status)
    assert killed
    if not out.exists():
        assert quantize(open_checkpoint(source), out, asked) == want
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not out.with_name("out.partial").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["rtn", "ptq161"])
def test_ten_kills_of_a_real_checkpoint(shared: Path, tmp_path: Path, method: str) -> None:
    source = shared / "models" / "stories260K"
    asked = job(None, calibration=(), samples=16, seq_len=256)
    if method == "ptq161":
        asked = fitted_job(samples=16, seq_len=64)
    began = time.perf_counter()
    want = quantize(open_checkpoint(source), tmp_path / "undisturbed", asked)
    whole = time.perf_counter() - began
    moments = random.Random(1)
    for number in range(10):
        out = tmp_path / str(number)
        die(
            lambda out=out: quantize(open_checkpoint(source), out, asked),
            moments.uniform(0, 1.1) * whole,
        )
        if not out.exists():
            assert quantize(open_checkpoint(source), out, asked) == want
        assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ctrl_c_leaves_something_resumable(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoint("llama", **LAYERS), tmp_path / "out"
    quantize(open_checkpoint(source), tmp_path / "undisturbed", job())

    def slowly() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        slowed(source, out, job())

    def two_shards() -> bool:
        return len(list(tmp_path.glob("out.partial/packed-*.safetensors"))) >= 2

    status = die(slowly, 0, signal.SIGINT, two_shards)
    assert os.waitstatus_to_exitcode(status) == 130
    assert not out.exists()
    before = contents(tmp_path / "out.partial")
    done = [name for name in before if name.endswith(".safetensors")]
    assert 2 <= len(done) < 6
    quantize(open_checkpoint(source), out, job())
    assert contents(out) == contents(tmp_path / "undisturbed")


class Stop(Exception):
    pass


class StopAfter(Reporter):
    """Reporter that ends a run once so many blocks are packed."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def progress(self, done: float, total: int, what: str) -> None:
        assert total == 5 and what == "blocks packed"
        if done == self.blocks:
            raise Stop


@pytest.mark.parametrize("calibrated", [False, True])
def test_stopped_after_a_block(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str, calibrated: bool
) -> None:
    source, asked = checkpoint("llama", **LAYERS), job(text_file if calibrated else None)
    want = quantize(open_checkpoint(source), tmp_path / "undisturbed", asked)
    original = Packing._pack
    for blocks in (2, 5):
        out = tmp_path / str(blocks)

        with pytest.raises(Stop):
            quantize(open_checkpoint(source), out, asked, reporter=StopAfter(blocks))
        packed: list[str] = []
        with pytest.MonkeyPatch.context() as patch:

            def spy(self: Any, index: int, *rest: Any, packed: list[str] = packed) -> Any:
                packed.append(self.stream.names[index])
                return original(self, index, *rest)

            patch.setattr(Packing, "_pack", spy)
            assert quantize(open_checkpoint(source), out, asked) == want
        assert packed == [f"model.layers.{index}" for index in range(blocks, 5)]
        assert contents(out) == contents(tmp_path / "undisturbed")


def test_output_errors_grow_along_the_blocks_and_shrink_with_bits(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str
) -> None:
    source = checkpoint("llama", **LAYERS)
    errors = []
    for bits in (2, 4, 8):
        asked = job(text_file, config=RTN.Config(bits=bits))
        report = quantize(open_checkpoint(source), tmp_path / str(bits), asked)
        errors.append([block.output_error for block in report.blocks])
        assert all(error > 0 for error in errors[-1])
    assert all(few > more > most for few, more, most in zip(*errors, strict=True))


def test_changed_input_options_or_text_do_not_resume(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str
) -> None:
    source, out = checkpoint("llama", **LAYERS), tmp_path / "out"

    with pytest.raises(Stop):
        quantize(open_checkpoint(source), out, job(text_file), reporter=StopAfter(1))
    before = contents(tmp_path / "out.partial")
    other = Path(text_file).with_name("other.txt")
    other.write_text(Path(text_file).read_text().replace("sheep", "goats"))
    for model, asked, run, message in (
        (checkpoint("llama", seed=1, **LAYERS), job(text_file), {}, "another source"),
        (source, job(text_file, config=RTN.Config(bits=4)), {}, r'options \({"bits": 3'),
        (source, job(str(other)), {}, "another calibration"),
        (source, job(text_file, seed=1), {}, "another calibration, seed"),
        (
            source,
            job(text_file, skip=["layers.4"], allow_dense=True),
            {},
            "another allow_dense, skip",
        ),
        (source, job(text_file), {"batch_size": 2}, "another calibration"),
        (source, job(text_file), {"dtype": torch.bfloat16}, "another calibration"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            quantize(open_checkpoint(model), out, asked, **run)
        assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_buffers_in_files_give_the_same_bytes(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text_file: str,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint(family)
    want = quantize(open_checkpoint(source), tmp_path / "memory", job(text_file))
    monkeypatch.setattr(stream, "BUFFERS_IN_MEMORY", 0)
    mapped: list[str] = []
    from_file = torch.from_file

    def watch(filename: str, **options: Any) -> torch.Tensor:
        mapped.append(Path(filename).name)
        return from_file(filename, **options)

    monkeypatch.setattr(torch, "from_file", watch)
    assert quantize(open_checkpoint(source), tmp_path / "files", job(text_file)) == want
    assert {"activations-original.bin", "activations-packed.bin"} == set(mapped)
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


@pytest.mark.parametrize("in_files", [False, True])
def test_full_disk_is_resumable(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text_file: str,
    in_files: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("llama-tied", intermediate_size=600)
    asked = job(text_file, method="rtn", config=RTN.Config(bits=8), samples=12)
    want = quantize(open_checkpoint(source), tmp_path / "undisturbed", asked)
    if in_files:
        monkeypatch.setattr(stream, "BUFFERS_IN_MEMORY", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Disk space for the embeddings (41 kB), but not for a block (66 kB) or a buffer in a file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if not in_files else 42_500, hard))
    try:
        with pytest.raises(SpectoolError, match="the disk is full") as caught:
            quantize(open_checkpoint(source), tmp_path / "out", asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert quantize(open_checkpoint(source), tmp_path / "out", asked) == want
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", ["weights alone", "calibrated", "a budget"])
def test_only_one_block_is_resident(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text_file: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    original = BlockStream.read

    def read(self: BlockStream, block: int) -> dict[str, torch.Tensor]:
        assert not [name for name, tensor in alive if tensor() is not None], f"at {block}"
        found = original(self, block)
        alive.extend((name, weakref.ref(tensor)) for name, tensor in found.items())
        return found

    monkeypatch.setattr(BlockStream, "read", read)
    source = checkpoint("llama", **LAYERS)
    asked = job(None if how == "weights alone" else text_file)
    if how == "a budget":
        asked = job(text_file, budget=Budget(4.0, list_widths(asked.quantizer, 4.0)))
    quantize(open_checkpoint(source), tmp_path / "out", asked)
    assert len(alive) == 5 * 9 * (1 + (how == "a budget"))


def test_bad_weights_in_a_late_block_leave_the_early_ones(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama", **LAYERS), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight: 1 of"):
        quantize(open_checkpoint(source), tmp_path / "out", job())
    assert len(list((tmp_path / "out.partial").glob("packed-*"))) == 4


def test_reports_name_every_matrix_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    report: QuantizeReport = quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", job())
    names = [layer.name for layer in report.layers]
    assert len(names) == len(set(names)) == 14
    assert all(0 < layer.error < 0.2 and 3 < layer.bits < 8 for layer in report.layers)
