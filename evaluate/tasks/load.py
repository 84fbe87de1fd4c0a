"""Tasks to ask: our own on local files, and lm-evaluation-harness's by name."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from spectool.errors import UsageError


def list_local() -> list[str]:
    """List the names of the tasks on local files, which the harness has on hub data."""
    folder = resources.files("spectool.evaluate.tasks") / "local"
    return sorted(Path(file.name).stem for file in folder.iterdir() if ".yaml" in file.name)


class TaskSet:
    """Tasks of the harness, loaded with their data. `tasks` maps names to the harness's objects.

    `shots`: examples before each question, None for each task's own number.

    Raises:
        UsageError: lm-eval is not installed, no such task, or its data cannot be read.
    """

    def __init__(self, names: Sequence[str], data: Path | None, shots: int | None = None) -> None:
        _check_installed()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.tasks: dict[str, Any] = {}
        local = list_local()
        manager = TaskManager(include_defaults=any(name not in local for name in names))
        for name in dict.fromkeys(names):
            if name not in (*local, *manager.all_tasks) and not Path(name).is_file():
                raise UsageError(
                    f"--task {name}: neither lm-eval nor spectool has this task",
                    hint=f"spectool's, with --task-data: {', '.join(local)}",
                )
            # What the harness's reader makes of local files; they are read again in every run.
            with tempfile.TemporaryDirectory(prefix="spectool-") as scratch:
                spec = _configure(name, data, scratch) if name in local else name
                try:
                    self.tasks |= manager.load([spec])["tasks"]
                except Exception as error:
                    # Whatever the harness, its data sets and the hub raise.
                    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                    raise UsageError(
                        f"--task {name}: its data cannot be loaded: {reason}"
                    ) from error
        for task in self.tasks.values():
            own = task.get_config("num_fewshot")
            # A task that says 0 takes no examples.
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)

    def metrics(self) -> Iterator[tuple[str, str, Any, bool]]:
        """Yield each task's name and metrics: the metric's name, its aggregation, whether higher is
        better."""
        for name, task in self.tasks.items():
            higher = task.higher_is_better()
            for metric, aggregation in task.aggregation().items():
                for each in task._filters:
                    yield name, rename(metric, each.name), aggregation, higher.get(metric, True)


def _configure(name: str, data: Path | None, scratch: str) -> dict[str, Any]:
    """Return the configuration of a task on local files, with the places of its files.

    Raises:
        UsageError: there is no folder, or a file is not in it.
    """
    if data is None:
        raise UsageError(f"--task {name} needs --task-data, the folder of its file")
    found = resources.files("spectool.evaluate.tasks") / "local" / f"{name}.yaml"
    config: dict[str, Any] = yaml.safe_load(found.read_text("utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        path = data / file
        if not path.is_file():
            raise UsageError(f"--task {name}: {path}: no such file")
        files[split] = str(path.resolve())
    config["dataset_kwargs"] |= {"cache_dir": scratch, "keep_in_memory": True}
    return config


def rename(metric: str, filter_name: str) -> str:
    """Return the name of a metric of filtered answers, such as a gate may write."""
    whole = metric if filter_name == "none" else f"{metric}_{filter_name}"
    return "".join(letter if letter.isalnum() else "_" for letter in whole)


def _check_installed() -> None:
    """Raise UsageError if the harness is not there."""
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "tasks need lm-evaluation-harness", hint="pip install 'spectool[tasks]'"
        ) from error
    datasets.disable_progress_bars()
