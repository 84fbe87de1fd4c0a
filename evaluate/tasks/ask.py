"""Ask a checkpoint the questions of tasks: the values of every item, by task and metric."""

from __future__ import annotations

from typing import Any

from spectool import machine
from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.generate import Runner
from spectool.errors import UsageError
from spectool.evaluate.context import Context
from spectool.evaluate.tasks.answers import Answers
from spectool.evaluate.tasks.kept import KeptAnswers
from spectool.evaluate.tasks.load import rename
from spectool.model.kernels import precision_of
from spectool.report import AnswersKept

# Examples before a question are drawn with the seed that the harness's own command takes.
SHOT_SEED = 1234

# Values of the items of a task, by metric.
Values = dict[str, list[Any]]


def ask(
    context: Context, checkpoint: Checkpoint, *, kv: str = "dense", draft: str | None = None
) -> dict[str, Values]:
    """Return the values of each task's items, in the order of the items.

    Raises:
        UsageError: a task wants what this model does not have, as a chat template.
    """
    assert context.tasks is not None
    options = context.options
    model = context.load_model(checkpoint)
    runner = Runner(
        model, draft=draft, tokenizer=context.tokenizer, kv=kv, forward=context.load.forward
    )
    target = runner.target
    settings = {
        "checkpoint": checkpoint.fingerprint(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        "activations": precision_of(model),
        "kv": kv,
        "fused_layers": target.num_fused,
        "draft": runner.drafter_name,
        # Else a score's last bits depend on what passes together.
        "batch_size": None if target.rows_are_independent else options.batch_size,
        **machine.software_versions(),
    }
    if options.task_chat and context.tokenizer.chat_template is None:
        raise UsageError(f"--task-chat: {checkpoint.name} has no chat template")
    from lm_eval.evaluator import evaluate

    from spectool.evaluate.tasks.harness import HarnessModel

    kept = KeptAnswers(options.task_log, settings)
    if len(kept):
        context.reporter.event(AnswersKept(len(kept), str(options.task_log), checkpoint.name))
    answers = Answers(runner, kept, batch_size=options.batch_size, reporter=context.reporter)
    for task in context.tasks.tasks.values():
        task.set_fewshot_seed(seed=SHOT_SEED)
    found = evaluate(
        HarnessModel(answers, options.template),
        {"tasks": context.tasks.tasks},
        limit=options.task_limit,
        bootstrap_iters=0,
        apply_chat_template=options.task_chat,
        fewshot_as_multiturn=options.task_chat,
    )
    return {name: _collect(items) for name, items in found["samples"].items()}


def _collect(items: list[dict[str, Any]]) -> Values:
    """Return the items' values by metric."""
    values: Values = {}
    for item in sorted(items, key=lambda each: each["doc_id"]):
        for metric in item["metrics"]:
            values.setdefault(rename(metric, item["filter"]), []).append(item[metric])
    return values
