"""Several processes on one step: the sums equal those of one process, and one process prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectool.distill.processes import ALONE, Processes, connect
from spectool.errors import TextError, UsageError

from ..conftest import contents
from .conftest import Train

# Small shards, so that both processes write some.
SCRIPT = """
import sys
import spectool.distill.data.features as features, spectool.distill.data.texts as texts
from spectool.cli import main
features._SHARD_BYTES, texts._GROUP = 20_000, 4
main()
"""


def torchrun(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the script in two processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, str(script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_two_processes_train_as_one(
    train: Train, checkpoint: Callable[..., Path], data: str, tmp_path: Path, script: Path
) -> None:
    """Also where a step has a single text, so that one process has none."""
    source, lines = checkpoint("llama"), tmp_path / "one.jsonl"
    asked = {"steps": 12, "batch_tokens": 140, "regenerate": True, "learning_rate": 1e-3}
    train(source, "one", where={"metrics": lines}, temperature=0.0, features="hybrid", **asked)
    done = torchrun(
        script, "train-heads", "medusa", source, tmp_path / "two", "--data", data, "--seq-len", 64,
        "--batch-tokens", 140, "--held-out", 4, "--learning-rate", 1e-3, "--num-heads", 3,
        "--regenerate", "--temperature", 0, "--features", f"offline:{tmp_path / 'features'}",
        "--steps", 12, "--metrics", tmp_path / "two.jsonl", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    assert done.stderr.count("plan: 12 steps") == 1
    assert len(list((tmp_path / "features").glob("features-own-*"))) > 2
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()[2:]]
        for name in ("one", "two")
    )
    assert min(line["tokens"] for line in one) <= 64 < max(line["tokens"] for line in one)
    for alone, together in zip(one, two, strict=True):
        assert together["tokens"] == alone["tokens"]
        for key in ("loss", "losses", "gradient_norm"):
            assert together[key] == pytest.approx(alone[key], abs=1e-5, rel=1e-5)
    first, second = (load_file(tmp_path / out / "heads.safetensors") for out in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=0)
    # What the two stored is what one would have.
    train(source, "again", features=f"offline:{tmp_path / 'features'}", temperature=0.0, **asked)
    again = load_file(tmp_path / "again" / "heads.safetensors")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def alone(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the script in one process."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def weights_command(source: Path, teacher: Path, out: Path, kind: str) -> tuple[object, ...]:
    """Return the beginning of a training of weights; updates are not split, all weights are."""
    if kind in ("logits", "packed teacher", "packed student"):
        return "distill", "logits", source, out, "--teacher", teacher
    if kind == "cross":
        return "distill", kind, source, out, "--width", 32, "--encoder-layers", 1
    if kind == "lexical-units":
        return "distill", kind, source, out, "--alpha", 0
    if kind == "sorted":
        return "distill", kind, source, out, "--exits", "1,3"
    own = ("--lora", 4) if kind == "updates" else ("--ar-weight", 1)
    return "distill", "consistency", source, out, "--block", 4, "--new-tokens", 16, *own


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint."""
    files = map(load_file, folder.glob("*.safetensors"))
    return {name: value for tensors in files for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("logits", "llama-tied"),
        ("consistency", "qwen3"),
        ("consistency", "gpt2"),
        ("updates", "llama"),
        ("lexical-units", "llama"),
        ("sorted", "llama-deep"),
        ("cross", "gpt2"),
        ("packed teacher", "llama"),
        ("packed student", "qwen3"),
    ],
)
def test_two_processes_train_weights_as_one(
    checkpoint: Callable[..., Path], data: str, tmp_path: Path, script: Path, kind: str, family: str
) -> None:
    """Also where a step has a single text, so that one process has none."""
    source, teacher = checkpoint(family), checkpoint(family, seed=1)
    if kind.startswith("packed"):
        dense = teacher if kind == "packed teacher" else source
        packing = ("quantize", "rtn", dense, tmp_path / "packed", "--bits", 3, "--group-size", 16)
        assert alone(script, *packing).returncode == 0
        source, teacher = (tmp_path / "packed" if p == dense else p for p in (source, teacher))
    words = (
        "--data", data, "--seq-len", 64, "--batch-tokens", 140, "--held-out", 4, "--steps", 8,
        "--learning-rate", 1e-3, "--json",
    )  # fmt: skip
    lines = {}
    for name, run in (("one", alone), ("two", torchrun)):
        metrics = tmp_path / f"{name}.jsonl"
        command = weights_command(source, teacher, tmp_path / name, kind)
        done = run(script, *command, *words, "--metrics", metrics)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 8
        lines[name] = [json.loads(line) for line in metrics.read_text().splitlines()[1:]]
    for first, second in zip(lines["one"], lines["two"], strict=True):
        for one, two in ((first, second), (first.get("held_out", {}), second.get("held_out", {}))):
            times = {"seconds", "tokens_per_second"}
            numbers = {k: v for k, v in one.items() if isinstance(v, float) and k not in times}
            close = pytest.approx(numbers, abs=1e-5, rel=1e-5)
            assert {key: two[key] for key in numbers} == close
    one, two, before = map(read_weights, (tmp_path / "one", tmp_path / "two", source))
    # A new model has names of its own. Eight steps make no random model a better draft, so `sorted`
    # keeps the first weights.
    changed = (name not in before or not torch.equal(t, before[name]) for name, t in one.items())
    assert any(changed) or kind == "sorted"
    for name, value in one.items():
        # The gradient of a bias of keys is rounding only, which Adam takes for a direction.
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)


def test_one_process_has_nobody_to_ask() -> None:
    assert ALONE.first and ALONE.part([1, 2, 3]) == [1, 2, 3]
    assert ALONE.sum([1, 2.5]) == [1, 2.5] and ALONE.gather("x") == ["x"]
    assert ALONE.device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(TextError, match="nothing"), ALONE.together():
        raise TextError("nothing")
    with connect("cpu") as found:
        assert found is ALONE


def test_a_device_cannot_be_shared() -> None:
    pair = Processes(rank=1, size=2, local_rank=1, local_size=2)
    assert pair.device(torch.device("cpu")) == torch.device("cpu")
    assert pair.part("abcde") == "bd"
    with pytest.raises(UsageError, match="--device cuda:0: 2 processes"):
        pair.device(torch.device("cuda:0"))
    with pytest.raises(UsageError, match="2 processes, and 0 CUDA devices"):
        pair.device(torch.device("cuda"))


# Each of two processes reports the errors that it sees to the test.
ERRORS = """
import json, sys, torch
from spectool.distill.processes import connect
from spectool.errors import SpectoolError, TextError

with connect("cpu") as processes:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + processes.rank)
    if not processes.first:
        parameters[1].grad = torch.ones(2)
    processes.sum_gradients(parameters)
    seen = {
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "sum": processes.sum([processes.rank, 0.5]),
        "gather": processes.gather([processes.rank]),
        "share": processes.share(processes.rank + 7),
        "errors": [],
    }
    for failing in (None, 0, 1):
        try:
            with processes.together():
                if processes.rank == failing:
                    raise TextError(f"said by {failing}", hint="wait")
        except SpectoolError as error:
            seen["errors"].append([type(error).__name__, str(error), error.hint])
sys.stderr.write(json.dumps(seen))
"""


def test_what_two_processes_tell_each_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ERRORS],
            env={
                **os.environ,
                **common,
                "MASTER_PORT": str(port),
                "RANK": rank,
                "LOCAL_RANK": rank,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    first, second = (json.loads(process.communicate(timeout=60)[1]) for process in started)
    assert first == second == {
        "gradients": [[3.0, 3.0], [1.0, 1.0], None],
        "sum": [1.0, 1.0],
        "gather": [[0], [1]],
        "share": 7,
        "errors": [["TextError", "said by 0", "wait"], ["TextError", "said by 1", "wait"]],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "logits", "consistency", "updates"])
def test_two_processes_stop_and_go_on(
    checkpoint: Callable[..., Path], data: str, tmp_path: Path, script: Path, kind: str
) -> None:
    """Both read the state that was stored; the bytes equal those without interruption."""
    script.write_text(
        "import sys, spectool.training as t\n"
        "t.Training.__init__.__kwdefaults__['save_seconds'] = -1\n"
        "t.Training.__init__.__kwdefaults__['save_share'] = float('inf')\n"
        "step, stop = t.Training._step, 'stopping' in sys.argv[4]\n"
        "def failing(self, number):\n"
        "    if stop and number == 5: raise RuntimeError('pulled the plug')\n"
        "    return step(self, number)\n"
        "t.Training._step = failing\n"
        "from spectool.cli import main\n"
        "sys.argv[4] = sys.argv[4].removesuffix('stopping'); main()\n"
    )
    words = ("--steps", 9, "--seq-len", 64, "--batch-tokens", 256, "--held-out", 4)
    source, teacher = checkpoint("llama"), checkpoint("llama", seed=1)
    for out in ("whole", "outstopping", "out"):
        command = weights_command(source, teacher, tmp_path / out, kind)
        if kind == "heads":
            command = ("train-heads", "medusa", source, tmp_path / out)
        done = torchrun(script, *command, "--data", data, *words)
        assert (done.returncode == 0) == (out != "outstopping"), done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_what_is_wrong_is_said_once(
    checkpoint: Callable[..., Path], data: str, tmp_path: Path, script: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stray").touch()
    for words, message in (
        (("--data", tmp_path / "absent.txt"), "absent.txt: no such file"),
        (("--data", data, "--steps", 2, "--seq-len", 64, "--learning-rate", 1e30), "diverged"),
        (("--data", data, "--steps", 2, "--seq-len", 64), "holds stray, which no spectool run"),
    ):
        done = torchrun(
            script, "train-heads", "medusa", checkpoint("llama"),
            tmp_path / ("out" if "stray" in message else "other"), *words,
        )  # fmt: skip
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0], done.stderr
