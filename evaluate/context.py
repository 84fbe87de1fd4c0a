"""Shared parts of the measures of one evaluation: opened once, and run over the text once.

The reference is a checkpoint, run at the same time, or a file written by `--save-reference`. A
checkpoint that does not fit in memory is run block by block.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from spectool.checkpoint.dtypes import parse_dtype
from spectool.checkpoint.headers import Layout, read_json
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.data.states import StateCodec
from spectool.data.stored_log_probs import LogProbsWriter, StoredLogProbs, expected_bytes
from spectool.data.text import BUILTIN, Prompt, check_ids, read_prompts
from spectool.data.windows import Windows
from spectool.decode.generate import Runner
from spectool.decode.options import CacheOptions
from spectool.errors import CheckpointError, NotFinite, UnsupportedError, UsageError
from spectool.evaluate.bench import Options, Run, bench
from spectool.evaluate.fidelity import (
    LogProbsReference,
    Reference,
    Scores,
    StoredReference,
    score,
)
from spectool.evaluate.layer_pairs import Walker
from spectool.evaluate.log_probs import (
    BlockwiseLogProbs,
    CachedLogProbs,
    LogProbs,
    ResidentLogProbs,
    resident_bytes,
)
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.protocols import make_windows
from spectool.evaluate.tasks.load import TaskSet
from spectool.evaluate.transcoder_plan import TranscoderPlan, plan_transcoder
from spectool.machine import available_memory
from spectool.model.lm_head import read_lm_head
from spectool.model.loading import (
    GENERATION,
    check_device,
    default_dtype,
    hash_vocabulary,
    load_model,
    load_tokenizer,
)
from spectool.model.meta import model_class, read_config
from spectool.report import SILENT, LayersNotCompared, NotItsSource, Reporter, StatesKept

# A model is loaded whole if it takes at most this share of the free memory.
MEMORY_SHARE = 0.7

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers")

# What an evaluation may have or lack: attributes of the context.
Need = Literal[
    "windows", "reference", "source", "walkers", "transcoder", "prompts", "openings", "tasks"
]

# Openings cut out of the text: how many, their tokens, and the new tokens of each.
OPENINGS, OPENING_TOKENS, OPENING_NEW_TOKENS = 16, 32, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Estimate of an evaluation on text: its tokens, and the size of the reference to save, if any.

    `text`: names of its sources.
    """

    text: str
    windows: Windows
    saved_bytes: int | None


class Context:
    """A checkpoint with what it is measured on. A part is None where the options give none.

    A reference keeps keys and values as they are, whatever `load` has for the checkpoint. A part
    raises InputError where it does not fit the checkpoint.
    """

    def __init__(
        self, load: CacheOptions, options: EvalOptions, *, reporter: Reporter = SILENT
    ) -> None:
        self.load, self.options, self.reporter = load, options, reporter
        # What the measures that run need.
        self.needs: set[Need] = set()
        self.checkpoint, self.device = load.open(), check_device(load.resolve_device())
        model_class(read_config(self.checkpoint))
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.vocabulary = _vocabulary(self.checkpoint.layout)

    @cached_property
    def reference(self) -> StoredLogProbs | Checkpoint | None:
        """The model to compare with: its log-probabilities in a file, or its checkpoint."""
        path = self.options.reference
        if path is None:
            return None
        if Path(path).is_file():
            saved = StoredLogProbs(Path(path))
            if saved.record.tokenizer != hash_vocabulary(self.tokenizer):
                raise UsageError(f"{path}: was made with another tokenizer")
            if saved.record.vocabulary != self.vocabulary:
                raise UsageError(f"{path}: has another vocabulary size")
            return saved
        other = open_checkpoint(
            path,
            trust_remote_code=self.checkpoint.trust_remote_code,
            checksums=self.checkpoint.checksums,
        )
        if hash_vocabulary(load_tokenizer(other)) != hash_vocabulary(self.tokenizer):
            raise UsageError(f"{path}: its tokenizer differs from {self.checkpoint.name}'s")
        if _vocabulary(other.layout) != self.vocabulary:
            raise UsageError(f"{path}: its vocabulary size differs from {self.checkpoint.name}'s")
        return other

    @cached_property
    def source(self) -> Checkpoint | None:
        """The reference, if the checkpoint was quantized from it."""
        other = self.reference
        if not isinstance(other, Checkpoint) or not self.checkpoint.layout.is_packed:
            return None
        made_from = (self.checkpoint.layout.quantization or {}).get("source") or {}
        if made_from.get("fingerprint") == other.fingerprint():
            return other
        self.reporter.event(NotItsSource(self.checkpoint.name, other.name))
        return None

    @cached_property
    def walkers(self) -> tuple[Walker, Walker] | None:
        """The reference and the checkpoint, if their decoder layers can be compared."""
        other = self.reference
        if not isinstance(other, Checkpoint):
            return None
        reason = None
        if self.load.kv != "dense":
            reason = "block by block there is no cache whose keys and values could be rounded"
        elif _shape(other) != _shape(self.checkpoint):
            reason = "they have other widths, numbers or kinds of layers"
        else:
            try:
                return self._open_walker(other), self._open_walker(self.checkpoint)
            except UnsupportedError as error:
                reason = str(error)
        self.reporter.event(LayersNotCompared(self.checkpoint.name, other.name, reason))
        return None

    @cached_property
    def windows(self) -> Windows:
        """The windows of the texts, or those of a reference in a file."""
        options, saved = self.options, self.reference
        if isinstance(saved, StoredLogProbs):
            _check_windows(options, saved, self._context_length)
            windows, origin, text = saved.windows, str(options.reference), options.reference
        else:
            if options.save_reference is not None and options.stride is not None:
                raise UsageError("--save-reference keeps windows that do not overlap: no --stride")
            windows = make_windows(
                options,
                self.tokenizer,
                self._context_length,
                end=self._end_id(),
                reporter=self.reporter,
            )
            origin = f"{self.checkpoint.path}: its tokenizer"
            text = ", ".join(options.text) or BUILTIN
        for ids_SL in windows.groups:
            check_ids([int(ids_SL.min()), int(ids_SL.max())], self.vocabulary, origin)
        saved_bytes = None
        if options.save_reference is not None and not options.save_states:
            saved_bytes = expected_bytes(windows, self.vocabulary, options.save_top_k)
        self.reporter.plan(Plan(text=str(text), windows=windows, saved_bytes=saved_bytes))
        return windows

    def _end_id(self) -> int | None:
        """Return the first id that ends a text, of the generation configuration or the tokenizer.

        Raises:
            CheckpointError: the generation configuration is damaged, or its ids are none.
        """
        path = self.checkpoint.path / GENERATION
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is None:
            found = self.tokenizer.eos_token_id
        first = found[0] if isinstance(found, list) and found else found
        if first is not None and type(first) is not int:
            raise CheckpointError(f"{path}: eos_token_id is {found!r}, expected an id or several")
        return first

    def setting(self) -> dict[str, object]:
        """Return what two results have in common that can be compared, as far as it is needed."""
        config = read_config(self.checkpoint).get_text_config(decoder=True)
        found: dict[str, object] = {name: getattr(config, name, None) for name in _SHAPE}
        found["tokenizer"] = hash_vocabulary(self.tokenizer)
        if self.needs & {"windows", "openings"}:
            found["text"] = self.windows.digest()
            for name in ("protocol", "length", "stride", "bos"):
                found[name] = getattr(self.windows, name)
        if self.options.reference is not None:
            match self.reference:
                case StoredLogProbs(record=record):
                    found["reference"] = record.source
                case Checkpoint() as other:
                    found["reference"] = other.fingerprint()
        if "transcoder" in self.needs and self.transcoder is not None:
            made_of = self.transcoder.made_of
            found["transcoder"] = [made_of[name] for name in ("layer", "width", "tokens")]
        if options := (self.options if self.options.task else None):
            found["tasks"] = [
                list(options.task), options.task_limit, options.task_shots, options.task_chat
            ]  # fmt: skip
        return found

    @cached_property
    def scores(self) -> Scores:
        """The sums of one pass over the windows, which also writes `--save-reference`."""
        options, windows = self.options, self.windows
        with contextlib.ExitStack() as stack:
            writer = None
            if options.save_reference is not None:
                path, top_k = options.save_reference, options.save_top_k
                opened = LogProbsWriter(path, windows, self.vocabulary, top_k=top_k)
                writer = stack.enter_context(opened)
            reference: Reference | None = None
            if "reference" in self.needs:
                if isinstance(self.reference, Checkpoint):
                    reference = LogProbsReference(self._open_log_probs(self.reference))
                elif self.reference is not None:
                    reference = StoredReference(self.reference)
            log_probs = self._open_log_probs(self.checkpoint, self.load.kv)
            if writer is not None and options.save_states:
                writer.keep_states(StateCodec(*read_lm_head(log_probs.model)))
            scores = score(
                windows,
                log_probs,
                self.vocabulary,
                reference=reference,
                batch_size=options.batch_size,
                sink=writer.add if writer else None,
                reporter=self.reporter,
            )
            scores.activations = log_probs.activations
            kl = scores.mean("kl") if reference is not None else 0.0
            for name, value in {"perplexity": scores.perplexity, "KL": kl}.items():
                if not math.isfinite(value):
                    raise NotFinite(
                        f"{self.checkpoint.name}: {name} is {value}: the logits are finite, but "
                        "the tokens of the text have almost no probability"
                    )
            if writer is not None:
                writer.finish(
                    source=self.checkpoint.fingerprint(),
                    tokenizer=hash_vocabulary(self.tokenizer),
                )
                if writer.codec is not None:
                    self.reporter.event(
                        StatesKept(
                            str(writer.path), writer.codec.width, self.vocabulary, writer.error
                        )
                    )
        return scores

    @cached_property
    def prompts(self) -> list[Prompt] | None:
        """The prompts that are continued."""
        options = self.options
        if options.prompts is None:
            return None
        return read_prompts(
            options.prompts,
            self.tokenizer,
            field=options.field,
            template=options.template or None,
            reporter=self.reporter,
        )

    @cached_property
    def openings(self) -> list[Prompt] | None:
        """Texts that the checkpoint continues: the prompts, or pieces of the evaluation text.

        None where it does not fit in memory as a whole.
        """
        if not self.fits(self.checkpoint):
            return None
        return self.prompts or cut_openings(self.windows, self.tokenizer, self._context_length)

    @property
    def new_tokens(self) -> int:
        """The number of tokens that openings are continued by."""
        most = self.options.max_new_tokens
        return most if self.options.prompts else min(most, OPENING_NEW_TOKENS)

    @cached_property
    def paired(self) -> Checkpoint | None:
        """The reference, where it is a checkpoint that fits in memory as a whole."""
        other = self.reference
        return other if isinstance(other, Checkpoint) and self.fits(other) else None

    @cached_property
    def transcoder(self) -> TranscoderPlan | None:
        """The plan of a transcoder; None where a checkpoint does not fit in memory as a whole.

        Raises:
            InputError: the checkpoints have other layers, the options are of decoding with a cache,
                or layer, text or file do not do (`plan_transcoder`).
        """
        other = self.paired
        if other is None or not self.fits(self.checkpoint):
            return None
        if _shape(other) != _shape(self.checkpoint):
            raise UsageError(
                f"{other.name}: has another width, number or kind of layers than "
                f"{self.checkpoint.name}"
            )
        if self.load.kv != "dense" or self.load.forward == "fused":
            raise UsageError("--measure transcoder has no cache: leave --kv and --forward out")
        is_packed = other.layout.is_packed
        how = {
            "dtype": str(self._dtype(other)).removeprefix("torch."),
            "runtime": self.load.runtime if is_packed else "dense",
            "activations": self.load.activations if is_packed else "exact",
        }
        return plan_transcoder(other, self.windows, self.options, how)

    def fits(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is loaded whole."""
        wanted = resident_bytes(checkpoint.layout, self._dtype(checkpoint))
        room = MEMORY_SHARE * available_memory(self.device)
        return not self.options.blockwise and wanted <= room

    @cached_property
    def tasks(self) -> TaskSet | None:
        """The tasks whose questions are asked."""
        options = self.options
        if not options.task:
            return None
        if not self.fits(self.checkpoint):
            raise UsageError("--task needs a model that fits in memory as a whole")
        if len(options.draft) > 1:
            raise UsageError("tasks take one --draft")
        return TaskSet(options.task, options.task_data, options.task_shots)

    @cached_property
    def decoding(self) -> Run:
        """The comparison of the drafters with plain decoding on the prompts, greedy."""
        assert self.prompts is not None
        model = self.load_model(self.checkpoint)
        runner = Runner(model, tokenizer=self.tokenizer, kv=self.load.kv, forward=self.load.forward)
        how = Options(
            drafts=self.options.draft or ("auto",), max_new_tokens=self.options.max_new_tokens
        )
        return bench(runner, self.prompts, how, reporter=self.reporter)

    @property
    def _context_length(self) -> int:
        return self.checkpoint.layout.context or 2048

    def _open_log_probs(self, checkpoint: Checkpoint, kv: str = "dense") -> LogProbs:
        """Load a checkpoint whole, or open it to run block by block.

        Raises:
            UsageError: keys and values are to be kept in a cache, and it cannot be loaded whole.
        """
        if not self.fits(checkpoint):
            if kv != "dense":
                raise UsageError(f"--kv {kv} needs the whole model; block by block has no cache")
            if self.load.forward == "fused":
                raise UsageError("--forward fused needs the whole model")
            return BlockwiseLogProbs(
                checkpoint,
                self.windows,
                dtype=self._dtype(checkpoint),
                device=self.device,
                activations=None if self.load.runtime == "dense" else self.load.activations,
                reporter=self.reporter,
            )
        model = self.load_model(checkpoint)
        forward = self.load.forward
        if kv == "dense" and forward != "fused":
            return ResidentLogProbs(model)
        return CachedLogProbs(model, kv, forward)

    def _open_walker(self, checkpoint: Checkpoint) -> Walker:
        return Walker(
            checkpoint,
            dtype=self._dtype(checkpoint),
            device=self.device,
            activations=None if self.load.runtime == "dense" else self.load.activations,
        )

    def _dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        return parse_dtype(self.load.dtype) or default_dtype(checkpoint.layout, self.device)

    def load_model(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Load a checkpoint whole, as the options say."""
        return load_model(
            checkpoint,
            dtype=self._dtype(checkpoint),
            device=str(self.device),
            runtime=self.load.runtime,
            activations=self.load.activations,
            reporter=self.reporter,
        )


def cut_openings(windows: Windows, tokenizer: Any, context: int) -> list[Prompt]:
    """Cut openings out of the text at equal distances, each after the tokenizer's start token.

    An opening is of one text (`Windows.texts`).
    """
    texts = windows.texts()
    start = [] if windows.bos is None else [windows.bos]
    start = start or list(tokenizer("", verbose=False)["input_ids"])[:1]
    size = max(1, min(OPENING_TOKENS, context // 2 - 1, max(map(len, texts))))
    # As many places as do not overlap, spread over each text.
    places = [
        (ids_T, int(at))
        for ids_T in texts
        for at in torch.linspace(0, len(ids_T) - size, len(ids_T) // size, dtype=torch.float64)
    ]
    count = min(OPENINGS, len(places))
    chosen = [places[(len(places) - 1) * index // max(1, count - 1)] for index in range(count)]
    return [Prompt([*start, *ids_T[at : at + size].tolist()]) for ids_T, at in chosen]


def _check_windows(options: EvalOptions, saved: StoredLogProbs, context: int) -> None:
    """Check that no option contradicts a saved reference, and that its windows fit.

    Raises:
        UsageError: one does, or they do not.
    """
    for option in options.changed():
        if option.name in ("text", "window", "stride", "protocol", "bos", "limit"):
            raise UsageError(f"--reference FILE contains the tokens; leave {option.flag} out")
    if saved.windows.length > context:
        raise UsageError(
            f"{options.reference}: has windows of {saved.windows.length} tokens; the model's "
            f"context is {context}"
        )


def _shape(checkpoint: Checkpoint) -> tuple[object, ...]:
    """Return what two checkpoints have in common whose decoder layers can be compared."""
    config = read_config(checkpoint).get_text_config(decoder=True)
    return tuple(getattr(config, name, None) for name in _SHAPE)


def _vocabulary(layout: Layout) -> int:
    text_config = layout.config.get("text_config") or {}
    size = layout.config.get("vocab_size") or text_config.get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{layout.path}: its configuration has no vocab_size")
    return size
