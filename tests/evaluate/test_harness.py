"""Tasks with lm-evaluation-harness, which comes with the extra `tasks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectool.decode.generate import Runner
from spectool.decode.options import CacheOptions
from spectool.errors import UsageError
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.evaluate.tasks.answers import Answers
from spectool.evaluate.tasks.kept import KeptAnswers
from spectool.evaluate.tasks.load import TaskSet, list_local
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,
    # Of the harness and what it imports.
    pytest.mark.filterwarnings("ignore"),
]

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "text",
    "metadata": {"version": 1},
}


def make_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> str:
    """Write a task with its data; returns the path of its YAML, which may be JSON."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("\n".join(map(json.dumps, rows)))
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    path.write_text(json.dumps({"task": name, **TASK, **files, **config}))
    return str(path)


def ask(model: Any, tasks: TaskSet, limit: int | None = None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate as ask_harness

    found = ask_harness(model, {"tasks": tasks.tasks}, limit=limit, bootstrap_iters=0)
    samples: dict[str, Any] = found["samples"]
    return samples


def make_both(path: Path) -> tuple[Any, Any]:
    """Return our model and the harness's own of one checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from spectool.evaluate.tasks.harness import HarnessModel

    runner = Runner(path, dtype="float32")
    ours = HarnessModel(Answers(runner, KeptAnswers(None, {}), batch_size=3))
    return ours, HFLM(str(path), dtype="float32", device="cpu", batch_size=1)


def test_scores_are_those_of_the_harness_on_every_local_task(shared: Path) -> None:
    pytest.importorskip("accelerate")
    ours, theirs = make_both(shared / "models/stories260K")
    for name in list_local():
        tasks = TaskSet([name], shared / "data/tasks")
        own, its = (ask(model, tasks, 8)[name] for model in (ours, theirs))
        assert len(own) == len(its) == 8
        for mine, other in zip(own, its, strict=True):
            for ((value, greedy),), ((expected, is_greedy),) in zip(
                mine["resps"], other["resps"], strict=True
            ):
                assert value == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
            for metric in set(mine["metrics"]) - {"perplexity"}:
                assert mine[metric] == other[metric]


def test_texts_and_rolling_scores_are_those_of_the_harness(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    ours, theirs = make_both(shared / "models/stories260K")
    begins = ["Once upon a time", "Lily and Tom were", "The dog saw a"]
    long = (shared / "models/README.md").read_text()[:3000]
    written = make_task(
        tmp_path,
        "continue",
        [{"text": begin, "end": "."} for begin in begins],
        output_type="generate_until",
        doc_to_target="end",
        generation_kwargs={"until": [".", "\n\n"], "max_gen_toks": 40},
        metric_list=[{"metric": "exact_match"}],
    )
    rolling = make_task(
        tmp_path,
        "rolling",
        [{"text": "A short text."}, {"text": long}],
        output_type="loglikelihood_rolling",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    tasks = TaskSet([written, rolling], None)
    own, its = ask(ours, tasks), ask(theirs, tasks)
    for mine, other in zip(own["continue"], its["continue"], strict=True):
        assert mine["resps"] == other["resps"] and mine["resps"][0][0]
    for mine, other in zip(own["rolling"], its["rolling"], strict=True):
        assert mine["resps"][0][0] == pytest.approx(other["resps"][0][0], rel=1e-6)


def run(model: Path, shared: Path, **options: Any) -> Any:
    given = {"measure": ("tasks",), "task_data": shared / "data/tasks", "task_limit": 12, **options}
    load = CacheOptions(model=str(model), dtype="float32")
    return evaluate(Context(load, EvalOptions(**given)))


def test_recovery_of_a_packed_checkpoint_is_gated(shared: Path, tmp_path: Path) -> None:
    source = shared / "models/stories260K"
    from spectool.checkpoint.tensors import open_checkpoint

    config = RTN.Config(bits=2, group_size=32)
    quantize(open_checkpoint(source), tmp_path / "out", QuantizeJob(method="rtn", config=config))
    names = ("local_piqa", "local_lambada")
    gates = ("recovery.upper>=0", "tasks.local_lambada.perplexity.recovery>=0.9")
    found = run(tmp_path / "out", shared, task=names, reference=str(source), gate=gates)
    assert [gate.holds for gate in found.gates] == [True, False]
    scores = found.as_json()["tasks"]["local_piqa"]["acc"]
    assert scores["items"] == 12 and {"lost", "gained", "p"} <= scores.keys()
    same = run(source, shared, task=names, reference=str(source), draft=("recycle",))
    assert same.as_json()["recovery"] == {"value": 1, "lower": 1, "upper": 1}
    with pytest.raises(UsageError, match=r"no metric tasks\.local_piqa\.f1"):
        run(source, shared, task=names, gate=("tasks.local_piqa.f1>0",))


def test_a_chat_template_and_examples_change_what_is_asked(shared: Path) -> None:
    model = shared / "models/codestory-10M"
    plain, chat, shots = (
        run(model, shared, task=("local_lambada",), task_limit=4, **more).as_json()["tasks"]
        for more in ({}, {"task_chat": True}, {"task_shots": 2})
    )
    assert plain != chat and plain != shots and chat != shots
    with pytest.raises(UsageError, match="has no chat template"):
        run(shared / "models/stories260K", shared, task=("local_lambada",), task_chat=True)


def test_tasks_that_cannot_be_read_are_refused_in_one_line(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/tasks"
    with pytest.raises(UsageError, match="needs --task-data"):
        TaskSet(["local_piqa"], None)
    with pytest.raises(UsageError, match="no such file"):
        TaskSet(["local_piqa"], tmp_path)
    with pytest.raises(UsageError, match="neither lm-eval nor spectool"):
        TaskSet(["no_such_task"], data)
    # The hub is out of reach in tests.
    with pytest.raises(UsageError, match="its data cannot be loaded") as caught:
        TaskSet(["piqa"], data)
    assert "\n" not in str(caught.value)


def test_a_killed_command_goes_on_and_ends_with_the_same_scores(
    shared: Path, tmp_path: Path
) -> None:
    log = tmp_path / "answers.jsonl"
    words = [sys.executable, "-m", "spectool", "eval", str(shared / "models/codestory-10M")]
    words += ["--measure", "tasks", "--task", "local_arc_easy", "--task", "local_lambada"]
    words += ["--task-data", str(shared / "data/tasks"), "--task-limit", "150", "--json"]
    words += ["--dtype", "float32", "--threads", "1"]
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    whole = json.loads(start(words).communicate()[0])["tasks"]
    logged = [*words, "--task-log", str(log)]
    process = start(logged, start_new_session=True)
    while not log.is_file() or log.read_bytes().count(b"\n") < 60:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = log.read_bytes().count(b"\n")
    found = json.loads(start(logged).communicate()[0])["tasks"]
    assert found == whole
    assert 60 <= kept < log.read_bytes().count(b"\n")
