"""Options of an evaluation. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectool.errors import UsageError
from spectool.options import option
from spectool.shared_options import TextOptions

# Steps on fewer tokens teach a transcoder nothing.
LEAST_TRANSCODER_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions(TextOptions):
    """Options of an evaluation: the measures, and the text."""

    reference: str | None = option(
        None, "Checkpoint to compare with, or a file written by --save-reference"
    )
    text: tuple[str, ...] = option(
        (),
        "Evaluation text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; repeatable",
    )
    window: int | None = option(
        None, "Tokens per window; default: the model's context, at most 2048", minimum=2
    )
    stride: int | None = option(
        None,
        "Begin a window every N tokens, so that windows overlap, and score the tokens that no "
        "earlier window held; default: no overlap",
        minimum=1,
    )
    protocol: Literal["text", "documents", "wikitext2", "c4"] = option(
        "text",
        "How the text becomes windows: as it is, each document by itself with the token that ends "
        "it, or as published tables have WikiText-2 (lines joined by blank lines) and C4 (256 "
        "random windows of long documents)",
    )
    bos: bool = option(False, "Start each window with the BOS token", switch=True)
    limit: int | None = option(None, "Use only the first N characters of the text", minimum=1)
    gate: tuple[str, ...] = option(
        (),
        "Condition on a metric, such as 'perplexity_ratio<=1.1': exit code 3 if it does not hold; "
        "repeatable",
    )
    baseline: Path | None = option(
        None,
        "Earlier output of eval --json to compare with; gates may name a change from it: "
        "'kl/baseline<=1.01', 'top1_agreement-baseline>=-0.001'",
    )
    measure: tuple[str, ...] = option(
        (),
        "What to measure (`spectool list measures`); repeatable; default: everything that the "
        "other options allow",
    )
    prompts: str | None = option(None, "File of prompts for speed and losslessness: .txt or .jsonl")
    draft: tuple[str, ...] = option(
        (),
        "Drafter, directory of draft heads or smaller checkpoint: NAME[:key=value,...]; "
        "repeatable; default: auto",
    )
    task: tuple[str, ...] = option(
        (),
        "Task: a local one (local_piqa, ...), or one of lm-evaluation-harness by its name or YAML "
        "file; repeatable",
    )
    task_data: Path | None = option(None, "Folder of the files of local tasks")
    task_limit: int | None = option(None, "Ask only the first N questions of each task", minimum=1)
    task_shots: int | None = option(
        None, "Examples before each question; default: the task's own number", minimum=0
    )
    task_chat: bool = option(False, "Ask questions in the chat template", switch=True)
    task_log: Path | None = option(
        None,
        "File that keeps answers as they come: a run that was killed goes on from there",
        written=True,
    )
    transcoder_layer: int | None = option(
        None,
        "Decoder layer, from 0 on, of --measure transcoder; default: the one in the middle",
        minimum=0,
    )
    transcoder_width: int = option(
        16, "Features of the transcoder as a multiple of the model's width", minimum=1
    )
    transcoder_tokens: int = option(
        131072,
        "Tokens that the transcoder is trained on; of a shorter text, the same ones again",
        minimum=LEAST_TRANSCODER_TOKENS,
    )
    transcoder_file: Path | None = option(
        None,
        "File that keeps the transcoder: where it exists, it is read and nothing is trained",
        written=True,
    )
    max_new_tokens: int = option(128, "Maximum number of new tokens per prompt", minimum=1)
    save_reference: Path | None = option(
        None, "File to write the model's log-probabilities to", written=True
    )
    save_top_k: int = option(
        0,
        "Log-probabilities per position that --save-reference keeps; 0: all",
        minimum=0,
    )
    save_states: bool = option(
        False,
        "Let --save-reference keep a state as wide as the model per position, and the lm_head, "
        "which give all log-probabilities back with an error that is measured",
        switch=True,
    )
    batch_size: int | None = option(
        None,
        "Number of windows run together, or of a task's contexts; default: as many windows as fit, "
        "8 contexts",
        minimum=1,
    )
    blockwise: bool = option(
        False, "Load and run one block at a time even if all would fit", switch=True
    )

    def validate(self) -> None:
        if self.save_states and (self.save_reference is None or self.save_top_k):
            raise UsageError("--save-states needs --save-reference FILE, without --save-top-k")
