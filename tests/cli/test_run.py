"""`spectool run`: what is refused, what runs, what is cached, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

from spectool.checkpoint.artifact import listed_files
from spectool.recipe import execute

from ..conftest import contents

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def started(spectool: Spectool, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run stages in this process, which has torch already; returns the words of each."""
    commands: list[list[str]] = []

    def start(words: Sequence[str], *, lock: int) -> tuple[int, str]:
        commands.append(list(words))
        done = spectool(*words, "--json")
        return done.code, done.out

    monkeypatch.setattr(execute, "start_process", start)
    return commands


@pytest.fixture
def recipe(
    checkpoint: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A recipe of small stages; the folder is the current one."""
    monkeypatch.chdir(tmp_path)
    text.write_text(text.read_text()[:1500])
    (tmp_path / "prompts.txt").write_text("import os\n")
    return {
        "model": str(checkpoint("llama")),
        "quantize": {"method": "rtn", "bits": 3},
        "train-heads": {"method": "medusa", "data": "text.txt", "steps": 0, "seq-len": 64},
        "eval": {"text": "text.txt", "gate": ["perplexity_ratio<=1000"]},
        "bench": {"prompts": "prompts.txt", "max-new-tokens": 4, "dtype": "float32"},
    }


def write(recipe: dict[str, Any], path: str = "release.yaml") -> str:
    Path(path).write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def states(done: Any) -> dict[str, str]:
    (variant,) = done.json["variants"]
    return {stage["stage"]: stage["state"] for stage in variant["stages"]}


def test_stages_run_once_and_again_where_something_changed(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    dry = spectool("run", write(recipe), "--dry-run", "--json")
    assert set(states(dry).values()) == {"runs"} and not Path("release").exists()
    done = spectool("run", "release.yaml", "--json")
    assert done.code == 0, done.err
    assert set(states(done).values()) == {"done"}
    assert [["spectool", *words] for words in started] == [
        stage["command"] for stage in dry.json["variants"][0]["stages"]
    ]
    # The stages took what those before them wrote.
    model = recipe["model"]
    assert started[0][:4] == ["quantize", "rtn", model, "release/packed"]
    assert started[1][:4] == ["train-heads", "medusa", "release/packed", "release/heads"]
    assert started[2][:4] == ["eval", "release/packed", "--reference", model]
    assert started[3][-4:-2] == ["--draft", "release/heads"] or "release/heads" in started[3]
    found = {path.name: json.loads(path.read_text()) for path in Path("release/results").iterdir()}
    assert sorted(found) == [
        "02-quantize.json", "03-train-heads.json", "05-eval.json", "06-bench.json",
    ]  # fmt: skip
    assert found["02-quantize.json"]["bits_per_weight"]["linears"] > 3
    assert found["05-eval.json"]["gates"][0]["holds"]
    run = json.loads(Path("release/run.json").read_text())
    assert [stage["stage"] for stage in run["stages"]] == list(states(done))
    assert run["machine"]["cores"] and run["versions"]["torch"]
    assert all(stage["key"].startswith("sha256:") for stage in run["stages"])

    again = spectool("run", "release.yaml", "--json")
    assert set(states(again).values()) == {"cached"} and len(started) == 4
    # A text counts by its content: what reads it runs again, and nothing else.
    Path("prompts.txt").write_text("import sys\n")
    changed = spectool("run", "release.yaml", "--json")
    assert states(changed) == {
        "quantize": "cached", "train-heads": "cached", "eval": "cached", "bench": "done",
    }  # fmt: skip
    # Other bits change all that takes the checkpoint.
    dry = spectool("run", "release.yaml", "quantize.bits=4", "--dry-run")
    assert "quantize: runs: its options, inputs or versions changed" in dry.out
    assert dry.out.count("quantize runs") == 3
    # What was removed or changed behind the run's back is made again, with the same bytes.
    before = contents(Path("release/packed"))
    shutil.rmtree("release/packed")
    Path("release/results/05-eval.json").unlink()
    mended = spectool("run", "release.yaml", "--json")
    assert states(mended) == {
        "quantize": "done", "train-heads": "cached", "eval": "done", "bench": "cached",
    }  # fmt: skip
    assert contents(Path("release/packed")) == before


def test_a_gate_that_does_not_hold_stops_its_variant(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    del recipe["train-heads"]
    recipe["eval"]["gate"] = "perplexity_ratio<=0.5"
    recipe["report"] = None
    done = spectool("run", write(recipe), "--json")
    assert done.code == 3
    assert states(done) == {
        "quantize": "done", "eval": "gate", "bench": "skipped", "report": "done",
    }  # fmt: skip
    assert started[-1] == ["report", "release", "--out", "release/report.html"]
    assert "perplexity_ratio" in Path("release/report.html").read_text()
    assert "does not run: the gate perplexity_ratio<=0.5 of eval does not hold" in done.err
    again = spectool("run", "release.yaml")
    assert again.code == 3 and [words[0] for words in started[2:]] == ["report"] * 2
    assert not Path("release/results/06-bench.json").exists()
    assert "gate perplexity_ratio<=0.5: does not hold" in again.out
    dry = spectool("run", "release.yaml", "--dry-run")
    assert "bench: does not run" in dry.out
    held = spectool("run", "release.yaml", "eval.gate=perplexity_ratio<=1000", "--json")
    assert held.code == 0 and states(held)["bench"] == "done"
    assert Path("release/results/06-bench.json").exists()
    assert spectool("run", "release.yaml").code == 3
    assert not Path("release/results/06-bench.json").exists()


def test_a_failed_stage_stops_what_takes_from_it(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    recipe["train-heads"]["init-from"] = "nothing-there"
    recipe["bench"]["draft"] = ["{train-heads}"]
    done = spectool("run", write(recipe), "--json")
    assert done.code == 2
    assert states(done) == {
        "quantize": "done", "train-heads": "failed", "eval": "done", "bench": "skipped",
    }  # fmt: skip
    (stages,) = (variant["stages"] for variant in done.json["variants"])
    assert "nothing-there" in stages[1]["reason"] and stages[3]["reason"] == "train-heads failed"
    assert not Path("release/results/03-train-heads.json").exists()


def test_variants_share_the_stages_that_are_equal(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    del recipe["bench"]
    recipe["matrix"] = {"train-heads.seed": [1, 2], "quantize.bits": [2]}
    done = spectool("run", write(recipe), "--json")
    assert done.code == 0, done.err
    assert [words[0] for words in started] == ["quantize", "train-heads", "eval", "train-heads"]
    first, second = (Path("release") / name for name in ("seed=1,bits=2", "seed=2,bits=2"))
    assert (first / "packed").is_dir() and not (second / "packed").exists()
    assert (first / "heads").is_dir() and (second / "heads").is_dir()
    name = "results/02-quantize.json"
    assert (first / name).read_text() == (second / name).read_text()
    (shared,) = [
        stage for stage in done.json["variants"][1]["stages"] if stage["stage"] == "quantize"
    ]
    assert (shared["state"], shared["reason"]) == ("cached", "shared with seed=1,bits=2")
    again = spectool("run", "release.yaml", "--json")
    assert len(started) == 4 and again.code == 0


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("quantize.bitz=3", "quantize.bitz: no option of quantize", "did you mean bits?"),
        ("eval.gates=x", "eval.gates: no option of eval", "did you mean gate?"),
        ("eval.method=x", "eval.method: no option of eval", None),
        ("quantize.method=rtm", "quantize.method: rtm: expected one of", "did you mean rtn?"),
        ("quantize.method=null", "expected one of", None),
        ("quantize.bits=9", "--bits 9: must be at most 8", None),
        ("quantize.bits=many", "bits=many: expected int", None),
        ("quantize.bits=[1,2]", "quantize.bits: expected one value", None),
        ("quantize.samples={a: 1}", "quantize.samples: expected one value", None),
        ("quantize.out=here", "quantize.out: set by the run", None),
        ("quantize.dry-run=true", "quantize.dry_run: set by the run", None),
        ("bench.prompts=gone.txt", "bench.prompts: gone.txt: no such file", None),
        ("bench.draft='{distill}'", "{distill} stands for nothing here", None),
        ("bench.draft={distill}", "draft: expected a list", 'in quotes: "{quantize}"'),
        ("tune.limit=2", "tune: expected prompts", None),
        ("all.thread=2", "all.thread: no option of a stage", "did you mean threads?"),
        ("model=./gone", "model: ./gone: no such directory", None),
        (
            "eval.gate=perplexity_ration<=2",
            "no metric perplexity_ration",
            "did you mean perplexity_ratio?",
        ),
        ("eval.gate=perplexity", "expected KEY<=NUMBER", None),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    spectool: Spectool,
    recipe: dict[str, Any],
    started: list[list[str]],
    override: str,
    message: str,
    hint: str | None,
) -> None:
    done = spectool("run", write(recipe), override)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and not started and not Path("release").exists()
    assert len(errors) == 1 and message in errors[0], done.err
    assert ("release.yaml, line" in errors[0]) or ("argument" in errors[0])
    if hint:
        assert hint in done.err.partition("hint: ")[2]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (["local_piqa"], "local_piqa.acc.recovery"),
        (["local_piqa", "my-task.yaml"], "my-task.exact_match.score.lower"),
        # A group's own tasks have other names.
        (["mmlu"], "mmlu_virology.acc.recovery"),
    ],
)
def test_gates_of_tasks_that_eval_may_accept_pass(
    spectool: Spectool, recipe: dict[str, Any], task: list[str], name: str
) -> None:
    Path("my-task.yaml").write_text("task: my-task")
    recipe["eval"] |= {"task": task, "gate": [f"tasks.{name}>=0.9", "recovery>=0.9"]}
    done = spectool("run", write(recipe), "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("given", "gate", "hint"),
    [
        ({"task": "local_piqa"}, "tasks.local_piqua.acc.recovery", "tasks.local_piqa."),
        ({"task": "mmlu"}, "tasks.mmlu.acc.recoveri", "tasks.TASK.METRIC.recovery"),
        ({}, "tasks.local_piqa.acc.score", None),
        ({"text": "text.txt"}, "transcoder.overlap", None),
    ],
)
def test_gates_that_eval_would_refuse_are_refused_before_anything_runs(
    spectool: Spectool,
    recipe: dict[str, Any],
    started: list[list[str]],
    given: dict[str, Any],
    gate: str,
    hint: str | None,
) -> None:
    recipe["eval"] |= {**given, "gate": f"{gate}>=0.9"}
    done = spectool("run", write(recipe))
    assert done.code == 2 and not started and f"no metric {gate}" in done.err
    assert hint is None or f"did you mean {hint}" in done.err


def test_a_log_of_answers_is_written_and_decides_no_result(
    spectool: Spectool, recipe: dict[str, Any], faked: list[list[str]]
) -> None:
    del recipe["train-heads"], recipe["bench"]
    recipe["eval"] |= {"gate": "kl<=99", "task-log": "answers.jsonl"}
    assert spectool("run", write(recipe)).code == 0
    for content in ("{}", "{}\n{}"):
        Path("answers.jsonl").write_text(content)
        assert states(spectool("run", "release.yaml", "--json"))["eval"] == "cached"
    Path("answers.jsonl").unlink()
    again = spectool("run", "release.yaml", "--dry-run")
    assert "eval: runs: answers.jsonl is gone" in again.out


@pytest.mark.slow
def test_shared_options_are_checked_without_torch(recipe: dict[str, Any]) -> None:
    recipe["eval"]["txt"] = "text.txt"
    script = (
        "import sys\nfrom spectool.cli import app\n"
        "try:\n    app(['run', 'release.yaml'])\n"
        "except SystemExit as stop:\n    assert stop.code == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    write(recipe)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "line 14: eval.txt: no option of eval" in done.stderr


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stages that do nothing; `eval` prints its words, and its gate holds if it is `kl<=99`."""
    commands: list[list[str]] = []

    def start(words: Sequence[str], *, lock: int) -> tuple[int, str]:
        commands.append(list(words))
        if words[0] != "eval":
            return 0, "{}"
        holds = "kl<=99" in words
        gate = {"expression": "kl", "value": 1.0, "holds": holds}
        return (0 if holds else 3), json.dumps({"words": words, "gates": [gate]})

    monkeypatch.setattr(execute, "start_process", start)
    return commands


@pytest.mark.parametrize("gates", [["kl<=99", "kl<=0"], ["kl<=0", "kl<=99"]])
def test_a_shared_stage_does_not_run_in_the_variant_that_a_gate_ended(
    spectool: Spectool, recipe: dict[str, Any], faked: list[list[str]], gates: list[str]
) -> None:
    del recipe["train-heads"]
    recipe["matrix"] = {"eval.gate": gates}
    for words in ((), (), ("--dry-run",)):
        done = spectool("run", write(recipe), *words, "--json")
        assert done.code == (0 if words else 3)
        holding, failing = (
            {stage["stage"]: stage for stage in done.json["variants"][gates.index(gate)]["stages"]}
            for gate in ("kl<=99", "kl<=0")
        )
        assert holding["bench"]["state"] in ("done", "cached")
        assert failing["eval"]["state"] == "gate" and failing["bench"]["state"] == "skipped"
        assert failing["bench"]["reason"] == "the gate kl of eval does not hold"
    assert sorted(words[0] for words in faked) == ["bench", "eval", "eval", "quantize"]


def test_a_result_whose_record_was_not_written_is_not_that_of_other_options(
    spectool: Spectool,
    recipe: dict[str, Any],
    faked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del recipe["train-heads"], recipe["bench"]
    recipe["eval"]["gate"] = "kl<=99"
    assert spectool("run", write(recipe)).code == 0
    whole = Path("release/results/05-eval.json").read_text()

    def kill(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execute.Execution, "_keep_record", kill)
        assert spectool("run", "release.yaml", "eval.window=32").code == 130
    again = spectool("run", "release.yaml", "--json")
    assert states(again) == {"quantize": "cached", "eval": "done"}
    assert Path("release/results/05-eval.json").read_text() == whole


def test_an_interrupted_run_leaves_no_earlier_success(
    spectool: Spectool,
    recipe: dict[str, Any],
    faked: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {name: recipe[name] for name in ("model", "quantize")}
    words = ("run", write(recipe), "--junit", "junit.xml", "--summary", "summary.md")
    assert spectool(*words).code == 0
    (suite,) = ElementTree.parse("junit.xml").getroot()
    assert suite.get("errors") == "0" and "| quantize | done |" in Path("summary.md").read_text()
    # A dry run writes nothing.
    assert spectool(*words, "--dry-run").code == 0
    assert "| quantize | done |" in Path("summary.md").read_text()
    monkeypatch.setattr(execute, "start_process", lambda words, *, lock: (execute.INTERRUPTED, ""))
    assert spectool(*words, "quantize.bits=4").code == 130
    (suite,) = ElementTree.parse("junit.xml").getroot()
    (error,) = suite.findall("testcase/error")
    assert suite.get("errors") == "1" and error.get("message") == "the run did not end"
    assert "**the run did not end**" in Path("summary.md").read_text()


def test_a_folder_that_no_run_made_is_left_alone(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    Path("release").mkdir()
    Path("release/mine.txt").write_text("mine")
    done = spectool("run", write(recipe))
    assert done.code == 2 and "no run made it" in done.err and not started
    assert [path.name for path in Path("release").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children")
def test_a_stage_whose_run_was_killed_before_it_could_ask_for_a_signal_ends() -> None:
    script = (
        "import os\nfrom spectool.recipe.execute import _end_with_parent\n"
        "_end_with_parent(os.getppid())\nprint('goes on', flush=True)\n"
        "_end_with_parent(os.getppid() + 1)\nprint('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "goes on\n"), done.stderr


def start_run(*, wait_for: str) -> subprocess.Popen[str]:
    """Start a run as a user does, and return it when its stderr has a line with these words."""
    words = [sys.executable, "-m", "spectool", "run", "release.yaml"]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if wait_for in line:
            return run
    raise AssertionError(f"the run ended before {wait_for}")


@pytest.mark.slow
def test_killed_at_each_stage_it_goes_on_to_the_same_results(recipe: dict[str, Any]) -> None:
    recipe["train-heads"]["steps"] = 2
    write(recipe)
    whole = [sys.executable, "-m", "spectool", "run", "release.yaml"]
    assert subprocess.run([*whole, "--out", "whole"]).returncode == 0
    for number, stage in enumerate(("quantize", "train-heads", "eval", "bench"), start=1):
        run = start_run(wait_for=f"$ spectool {stage}")
        # The stage's first line is its plan, or what it read: the work is ahead.
        assert run.stderr is not None and run.stderr.readline()
        how = signal.SIGKILL if number % 2 else signal.SIGTERM
        os.kill(run.pid, how)
        run.communicate()
        assert run.returncode == (-how if how == signal.SIGKILL else 130)
        assert not Path(f"release/results/0{number + (number > 2) + 1}-{stage}.json").exists()
    done = subprocess.run([*whole, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (variant,) = json.loads(done.stdout)["variants"]
    assert [stage["state"] for stage in variant["stages"]] == ["cached"] * 3 + ["done"]
    for folder in ("packed", "heads"):
        left, right = (contents(Path(run) / folder) for run in ("release", "whole"))
        # The card has the speed that each run measured.
        cards = [found.pop("README.md", b"").splitlines() for found in (left, right)]
        timeless = [[line for line in card if b"tokens per second" not in line] for card in cards]
        assert left == right and timeless[0] == timeless[1]
    assert not list(Path("release").glob("*.partial*"))
    left, right = (
        json.loads((Path(run) / "results/05-eval.json").read_text()) for run in ("release", "whole")
    )
    assert left["perplexity"] == right["perplexity"]


def test_reports_and_cards_say_what_came(
    spectool: Spectool, recipe: dict[str, Any], started: list[list[str]]
) -> None:
    del recipe["train-heads"]
    recipe["eval"]["gate"] = ["perplexity_ratio<=1000", "kl<=0"]
    recipe["matrix"] = {"eval.gate": [["kl<=0", "perplexity_ratio<=1000"], "perplexity_ratio<=99"]}
    reports = ("--junit", "junit.xml", "--summary", "summary.md")
    done = spectool("run", write(recipe), *reports)
    assert done.code == 3, done.err
    failing, holding = ElementTree.parse("junit.xml").getroot()
    counts = ("tests", "failures", "errors", "skipped")
    assert [failing.get(key) for key in counts] == ["5", "1", "0", "1"]
    assert [holding.get(key) for key in counts] == ["4", "0", "0", "0"]
    (failed,) = failing.findall("testcase[failure]")
    assert failed.get("name") == "gate kl<=0"
    said = failing.findtext("testcase[@name='quantize']/system-out")
    assert said == "spectool " + shlex.join(started[0])
    summary = Path("summary.md").read_text()
    assert (
        "| `kl<=0` | **does not hold** |" in summary
        and "| `perplexity_ratio<=99` | holds |" in (summary)
    )
    assert "| bench | did not run: the gate kl<=0 of eval does not hold |" in summary
    assert "| tokens per second, plain |" in summary
    folder = next(Path("release").glob("*kl*"))
    readme = (folder / "packed/README.md").read_text()
    results = ModelCard(readme).data.to_dict()["model-index"][0]["results"]
    found = json.loads((folder / "results/05-eval.json").read_text())
    values = {each["type"]: each["value"] for result in results for each in result["metrics"]}
    assert values["kl"] == pytest.approx(found["kl"]["value"], abs=1e-6)
    assert results[0]["dataset"]["name"] == "text.txt"
    assert "`spectool eval PATH --reference BASE --text text.txt" in readme
    assert str(Path.cwd()) not in readme and recipe["model"] not in readme
    # The card changes nothing that is cached, and no file is a stray one.
    assert spectool("run", "release.yaml").code == 3 and len(started) == 4
    assert spectool("inspect", folder / "packed", "--checksums").code == 0
    assert set(listed_files(folder / "packed")) == set(contents(folder / "packed"))
