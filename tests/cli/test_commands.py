"""Each command end to end: its text and JSON output, and its exit codes."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open

from spectool.cli import app
from spectool.cli.derive import PANELS
from spectool.machine import reproducible
from spectool.shared_options import PlaceOptions

from ..conftest import VOCAB, contents

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def packed(spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path) -> Path:
    done = spectool("quantize", "rtn", checkpoint("llama"), tmp_path / "packed")
    assert done.code == 0, done.err
    return tmp_path / "packed"


def stored_bits(path: Path) -> tuple[float, float]:
    """Count bits per weight of quantized linears, and of all files, with safetensors itself."""
    fields = weights = parameters = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                if ".q." in name:
                    fields += tensor.numel() * tensor.element_size()
                else:
                    parameters += tensor.numel()
    config = json.loads((path / "config.json").read_text())
    for entry in config["quantization_config"]["modules"].values():
        weights += math.prod(entry["shape"])
    file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return 8 * fields / weights, 8 * file_bytes / (weights + parameters)


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8"])
def test_quantize_and_inspect_say_what_the_files_hold(
    method: str, spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = spectool("quantize", method, checkpoint("qwen3"), out, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert result["schema_version"] == 3
    wanted = {"out", "method", "bits_per_weight", "bytes", "seconds", "peak_rss_bytes", "layers"}
    assert wanted <= result.keys()
    assert {"name", "bits", "error"} == result["layers"][0].keys()
    assert result["command"] == f"spectool quantize {method} {checkpoint('qwen3')} {out}"
    assert result["machine"]["threads"] >= 1
    linears, file = stored_bits(out)
    seen = spectool("inspect", out, "--json").json
    assert {"kind", "method", "modules", "bits_per_weight", "source", "command"} <= seen.keys()
    assert seen["kind"] == "packed" and seen["method"] == method
    for metrics in (result["bits_per_weight"], seen["bits_per_weight"]):
        assert metrics["linears"] == pytest.approx(linears, rel=1e-12)
        assert metrics["file"] == pytest.approx(file, rel=1e-12)
    assert len(seen["modules"]) == 14
    people = spectool("inspect", out, "--layers")
    assert f"{linears:.4f} bits" in people.out and seen["command"] in people.out


def test_a_device_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, cpu = PlaceOptions(model="m"), PlaceOptions(model="m", device="cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert auto.resolve_device() == "cuda" and cpu.resolve_device() == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert auto.resolve_device() == "cpu"


def test_sums_in_one_order_only_while_it_is_asked_for() -> None:
    with reproducible(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), reproducible(torch.device("cuda")):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_command_that_inspect_prints_makes_the_same_bytes(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--bits", 3, "--symmetric", "--skip", "q_proj", "--allow-dense", "--seed", 5]
    calibration = ["--calibration", text, "--samples", 3, "--seq-len", 24]
    model = checkpoint("llama")
    done = spectool("quantize", "rtn", model, first, *options, *calibration)
    assert done.code == 0, done.err
    words = spectool("inspect", first, "--json").json["command"].split()
    paths = {"MODEL": model, "OUT": second, "TEXT": text}
    done = spectool(*[paths.get(word, word) for word in words[1:]])
    assert done.code == 0, done.err
    assert contents(first) == contents(second)


def test_dry_run_writes_nothing_and_foretells_the_bits(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = spectool("quantize", "rtn", checkpoint("llama"), out, "--dry-run", "--json")
    assert done.code == 0 and not out.exists() and not list(tmp_path.glob("*.partial"))
    for word in ("disk", "memory at most", "expected bits per weight", "left dense" * 0):
        assert word in done.err
    spectool("quantize", "rtn", checkpoint("llama"), out)
    linears, _ = stored_bits(out)
    assert done.json["expected_bits_per_weight"]["linears"] == pytest.approx(linears)


@pytest.mark.parametrize(
    ("words", "present", "absent"),
    [
        (["rtn"], [], "calibrated"),
        (["gptq"], ["the built-in text, at most 128 sequences of 256 tokens",
                    "the model's context; --seq-len 2048 is cut", "--calibration FILE with text"],
         "more of"),
        (["gptq", "--seq-len", 64, "--samples", 3],
         ["at most 3 sequences of 64 tokens", "--calibration FILE"], "is cut"),
        (["gptq", "--calibration", "TEXT", "--seq-len", 257],
         ["text.txt, at most 128 sequences of 256", "--seq-len 257 is cut"], "loses less"),
        (["rtn", "--calibration", "TEXT", "--seq-len", 256], ["text.txt, at most"], "is cut"),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_calibrated_on(
    spectool: Spectool,
    checkpoint: Checkpoint,
    text: Path,
    tmp_path: Path,
    words: list[Any],
    present: list[str],
    absent: str,
) -> None:
    method, *rest = (text if word == "TEXT" else word for word in words)
    done = spectool("quantize", method, checkpoint("llama"), tmp_path / "out", *rest, "--dry-run")
    assert done.code == 0, done.err
    for line in present:
        assert line in done.err
    assert absent not in done.err


def test_a_text_that_holds_fewer_sequences_says_so(
    spectool: Spectool, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    words = ["--calibration", text, "--seq-len", 64, "--group-size", 16]
    done = spectool("quantize", "gptq", checkpoint("llama"), tmp_path / "out", *words)
    assert done.code == 0 and re.search(r"calibration: \d+ of 128 sequences, all that", done.err)


def test_eval_compares_and_gates(
    spectool: Spectool, checkpoint: Checkpoint, packed: Path, text: Path, tmp_path: Path
) -> None:
    text.write_text(text.read_text()[:1000])
    words = ["eval", packed, "--text", text, "--window", 32, "--reference", checkpoint("llama")]
    done = spectool(*words, "--gate", "perplexity_ratio<=100", "--json")
    assert done.code == 0, done.err
    result = done.json
    named = {
        "value",
        "lower",
        "upper",
        "tokens",
        "protocol",
        "window",
        "stride",
        "bos",
        "activations",
        "kv",
    }
    assert named | {"by_position", "by_frequency"} == result["perplexity"].keys()
    assert {"reference", "perplexity_ratio", "kl", "top1_agreement", "gates"} <= result.keys()
    assert result["gates"] == [
        {
            "expression": "perplexity_ratio<=100",
            "value": result["perplexity_ratio"]["value"],
            "holds": True,
        }
    ]
    assert "protocol: windows of 32 tokens" in done.err
    assert (
        result["bits_per_weight"] == spectool("inspect", packed, "--json").json["bits_per_weight"]
    )
    assert result["model"] == str(packed) and result["machine"]["threads"] >= 1
    again = spectool(*shlex.split(result["command"])[1:], "--json").json
    assert again == result
    failed = spectool(*words, "--gate", "kl<=0")
    assert failed.code == 3 and "does not hold" in failed.out
    assert spectool(*words, "--gate", "speed>=1").code == 2
    file = tmp_path / "reference"
    words = ["eval", checkpoint("llama"), "--text", text, "--window", 32]
    assert spectool(*words, "--save-reference", file, "--bos").code == 0
    assert spectool("eval", packed, "--reference", file, "--json").json["kl"]["value"] > 0


def test_generate_from_options_file_and_stdin(
    spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    model = checkpoint("llama")
    done = spectool("generate", model, "--prompts", prompts, "--max-new-tokens", 9, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert {"text", "token_ids", "forwards"} <= result["results"][0].keys()
    keys = "new_tokens seconds tokens_per_second forwards tokens_per_forward drafter lossless"
    assert set(keys.split()) <= result.keys()
    assert len(result["results"]) == 2 and result["lossless"] is True
    assert result["drafter"] == "trigram+recycle"
    plain = spectool(
        "generate", model, "--prompts", prompts, "--max-new-tokens", 9, "--json", "--draft", "none",
        "--batch-size", 2,
    )  # fmt: skip
    assert plain.json["tokens_per_forward"] == 1.0
    for ours, theirs in zip(result["results"], plain.json["results"], strict=True):
        assert ours["token_ids"] == theirs["token_ids"] and ours["text"] == theirs["text"]
    piped = spectool("generate", model, "--max-new-tokens", 9, stdin="from pathlib import Path")
    assert piped.out == "from pathlib import Path" + result["results"][0]["text"] + "\n"
    assert "tok/s" in piped.err
    both = spectool("generate", model, "--prompt", "a", "--prompts", prompts)
    assert both.code == 2 and "exclude each other" in both.err


def test_bench_lists_drafters_in_order(
    spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    drafts = ["ngram", f"{checkpoint('llama', seed=1)}:depth=2"]
    words = ["bench", checkpoint("llama"), "--prompts", prompts, "--max-new-tokens", 12]
    done = spectool(*words, "--draft", drafts[0], "--draft", drafts[1], "--json")
    assert done.code == 0, done.err
    result = done.json
    assert result["machine"]["threads"] >= 1
    assert [row["name"] for row in result["drafters"]] == drafts
    keys = "name drafted accepted tokens_per_forward tokens_per_second speedup identical prompts"
    for row in result["drafters"]:
        assert {*keys.split(), "lossless"} <= row.keys()
        assert row["identical"] == row["prompts"] == 2
    assert "kept" in spectool(*words).out


def test_bench_exits_1_when_a_lossless_drafter_changes_the_output(
    spectool: Spectool,
    checkpoint: Checkpoint,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spectool.evaluate import bench

    make_row = bench._make_row

    def lie(name: str, timed: Any, *more: Any) -> Any:
        if name == "ngram":
            timed.results[0].token_ids[-1] ^= 1
        return make_row(name, timed, *more)

    monkeypatch.setattr(bench, "_make_row", lie)
    words = ["bench", checkpoint("llama"), "--prompts", prompts, "--max-new-tokens", 8]
    done = spectool(*words, "--draft", "ngram")
    assert done.code == 1 and "differs from plain decoding" in done.err


def test_an_interrupted_generation_shows_what_it_has_in_one_object(
    spectool: Spectool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectool.decode.target.attention import AttentionTarget

    forward, calls = AttentionTarget._forward, []

    def stop(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(AttentionTarget, "_forward", stop)
    # Opening a target with fused layers takes passes too.
    words = ["--prompt", "from pathlib", "--draft", "none", "--forward", "modules"]
    done = spectool("generate", checkpoint("llama"), *words, "--json")
    assert done.code == 130
    (result,) = done.json["results"]
    assert result["finish_reason"] == "interrupted" and len(result["token_ids"]) == 3
    calls.clear()
    bench = [
        "bench",
        checkpoint("llama"),
        "--prompts",
        __file__,
        "--limit",
        1,
        "--forward",
        "modules",
    ]
    stopped = spectool(*bench, "--json")
    assert stopped.code == 130 and stopped.json["error"]["exit_code"] == 130


def test_bench_refuses_a_wrong_drafter_before_it_decodes(
    spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    words = ["bench", checkpoint("llama"), "--prompts", prompts, "--draft", "ngram"]
    for more in (["--draft", "ngram:depth=0"], ["--verify", "cheese"]):
        done = spectool(*words, *more)
        assert done.code == 2 and "plain decoding" not in done.err


def test_list_and_doctor(spectool: Spectool) -> None:
    everything = spectool("list", "--all", "--json").json["methods"]
    assert {row["name"] for row in everything} >= {"rtn", "nf4", "int8", "ngram", "rejection"}
    kernels = {row["name"]: row["kernels"] for row in everything}
    assert kernels["rtn"] == {"cpu": ["exact", "int16", "int8"]} and kernels["olive"] == {
        "cpu": ["exact"]
    }
    assert kernels["olive-activations"] == kernels["ngram"] == {}
    assert "[kernel on cpu: exact, int16 or int8 activations]" in spectool("list", "quantizers").out
    only = spectool("list", "drafter").out
    assert "ngram" in only and "rtn" not in only
    assert spectool("list", "cheese").code == 2
    doctor = spectool("doctor", "--json").json
    assert doctor["packages"]["torch"] and doctor["machine"]["processor"]
    found = doctor["machine"]
    people = spectool("doctor").out
    assert f"threads: {found['threads']} ({found['threads_reason']})" in people
    assert "waiting threads: " in people
    built = doctor["library"]
    if "reason" in built:
        assert f"kernels: none ({built['reason']})\n" in people
    else:
        flags = ", ".join(built["flags"]) or "only what all processors of its kind have"
        expected = f"{built['variant']}, {built['origin']}; the processor's flags used: {flags}"
        assert f"kernels: {expected}\n" in people
    assert {"dense, bfloat16", "packed, float32"} <= doctor["kernels"].keys()
    for name, choice in doctor["kernels"].items():
        assert re.fullmatch(r"torch \(.+\)|kernel( for up to \d+ rows)?", choice)
        assert f"  {name}: {choice}\n" in people


def test_doctor_shows_the_newest_curves(
    spectool: Spectool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "spectool").mkdir()
    curves = {f"model {number}": {"1": {"1": 0.001, "2": 0.002}} for number in range(8)}
    text = json.dumps({"format": 2, "curves": curves})
    (tmp_path / "spectool/curves.json").write_text(text)
    newest = spectool("doctor").out
    assert [number for number in range(8) if f"model {number}: " in newest] == [3, 4, 5, 6, 7]
    assert "3 older: --all shows them" in newest
    everything = spectool("doctor", "--all").out
    assert all(f"model {number}: " in everything for number in range(8))
    assert "older:" not in everything
    assert spectool("doctor", "--json").json["passes"].keys() == curves.keys()


def test_a_model_in_the_methods_place_gets_a_hint(
    spectool: Spectool, checkpoint: Checkpoint
) -> None:
    done = spectool("quantize", checkpoint("llama"), "out")
    assert done.code == 2 and "give the method first" in done.err
    assert "did you mean rtn" in spectool("quantize", "rnt", "m", "o").err


def commands() -> list[tuple[str, Any]]:
    from spectool.cli import DISTILL, QUANTIZE, TRAIN_HEADS

    root: Any = typer.main.get_command(app)
    verbs = (QUANTIZE, TRAIN_HEADS, DISTILL)
    groups = {verb.name for verb in verbs}
    found: list[tuple[str, Any]] = []
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            found += [(f"{name} {sub}", each) for sub, each in command.commands.items()]
        elif name not in groups:
            found.append((name, command))
    return found + [
        (f"{verb.name} {name}", verb.command(name)) for verb in verbs for name in verb.known()
    ]


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: str(value)[:14])
def test_every_option_says_what_it_is(name: str, command: Any) -> None:
    assert command.help
    for parameter in command.params:
        assert parameter.help and not parameter.help.endswith("."), f"{name} {parameter.name}"


def test_help_lists_commands_in_the_order_of_the_pipeline(spectool: Spectool) -> None:
    shown = spectool("--help").out
    words = (
        "Compress", "quantize", "distill", "Accelerate", "train-heads", "tune", "Measure", "eval",
        "bench", "Run", "generate", "chat", "export", "run", "push", "Look", "inspect", "list",
        "doctor", "demo",
    )  # fmt: skip
    # Titles stand behind a line, commands behind the frame.
    order = [shown.index(f"{'─' if word.istitle() else '│'} {word} ") for word in words]
    assert order == sorted(order)
    root: Any = typer.main.get_command(app)
    assert set(root.list_commands(None)) == set(root.commands)


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: str(value)[:14])
def test_every_option_stands_in_one_panel(name: str, command: Any, spectool: Spectool) -> None:
    """Arguments, then the command's own options, then the shared ones in the panels' order."""
    params = [parameter for parameter in command.params if parameter.name != "help"]
    shown = [parameter.rich_help_panel for parameter in params if parameter.opts[0][0] == "-"]
    verb, *method = name.split()
    # Commands of a group have no methods, whose options would have a title.
    own = f"Options of {method[0]}" if method and verb != "audit" else None
    order = list(dict.fromkeys(shown))
    assert order == [panel for panel in (own, *PANELS) if panel in order]
    assert sorted(shown, key=order.index) == shown
    text = spectool(verb, *method, "--help").out
    titles = [text.index(f"─ {title or 'Options'} ─") for title in order]
    assert titles == sorted(titles) and text.index("--help") > titles[-1]


def test_the_reference_page_is_up_to_date() -> None:
    import importlib.util

    root = Path(__file__).parent.parent.parent
    spec = importlib.util.spec_from_file_location("ref", root / "docs/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs/reference.md").read_text() == module.reference()


def test_a_banned_text_is_never_written_and_a_bias_decides(
    spectool: Spectool, checkpoint: Callable[..., Path]
) -> None:
    """Greedy text with its commonest piece banned, and one token that a bias forces."""
    words = ["generate", checkpoint("llama"), "--prompt", "a b c", "--max-new-tokens", 24, "--json"]
    (plain,) = spectool(*words).json["results"]
    first = plain["token_ids"][0]
    (changed,) = spectool(*words, "--logit-bias", f"{first}=-inf", "--ban", "e").json["results"]
    assert changed["token_ids"][0] != first and "e" not in changed["text"]
    (forced,) = spectool(*words, "--logit-bias", "7=1000", "--draft", "ngram").json["results"]
    assert set(forced["token_ids"]) == {7}


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_that_every_token_is_excluded_is_one_line(
    spectool: Spectool, checkpoint: Callable[..., Path], draft: str, temperature: float
) -> None:
    biases = [word for token in range(VOCAB) for word in ("--logit-bias", f"{token}=-inf")]
    words = ["--prompt", "a", "--draft", draft, "--temperature", temperature]
    done = spectool("generate", checkpoint("llama"), *words, *biases)
    assert done.code == 1 and "exclude every token after 0 new ones" in done.err
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--logit-bias", "9999=1"], "--logit-bias 9999=1: token ids of this model run from 0"),
        (["--logit-bias", "x"], "expected TOKEN=VALUE"),
        (["--ban", ""], "--ban: a text must not be empty"),
    ],
)
def test_controls_that_mean_nothing_are_one_line(
    spectool: Spectool, checkpoint: Callable[..., Path], words: list[str], message: str
) -> None:
    done = spectool("generate", checkpoint("llama"), "--prompt", "a", *words)
    assert done.code == 2 and message in done.err and done.out == ""


def test_imports_are_not_searched_for_garbage() -> None:
    script = (
        "import gc\n"
        "from spectool.cli.common import prepare_torch\n"
        "before = gc.get_stats()[2]['collections']\n"
        "prepare_torch(None)\n"
        "assert gc.get_stats()[2]['collections'] == before\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "frozen = gc.get_freeze_count()\n"
        # Objects of a program that imported torch itself stay where they are.
        "prepare_torch(None)\n"
        "assert gc.get_freeze_count() == frozen\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
