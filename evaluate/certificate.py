"""The certificate of losslessness: what was compared with plain decoding, and what was found.

It holds no times and no paths. The same model, prompts and options give the same certificate on the
same kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spectool import machine, methods
from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams, VerifyOptions
from spectool.decode.target.base import Target
from spectool.decode.target.open import open_target
from spectool.errors import InputError, UsageError
from spectool.evaluate.certify.laws import LEVEL, SAMPLING, Law, compare_laws
from spectool.evaluate.certify.rows import Rows, compare_rows, promises_rows
from spectool.evaluate.certify.texts import Texts, compare_texts
from spectool.evaluate.results import as_json
from spectool.model.kernels import name_library, precision_of
from spectool.model.loading import describe_runtime
from spectool.report import SILENT, Reporter

FORMAT_VERSION = 1
# What may be promised, the strongest first: who promises one promises those after it.
KINDS = ("rows", "texts", "laws")
WIDTHS, BATCHES = (1, 2, 4, 8, 16, 32, 64), tuple(range(1, 9))
# Last tokens of a prompt that rows are compared behind.
ROW_PROMPT = 256
# Prompts whose short continuations are sampled, how many of each, and how many together.
LAW_PROMPTS, LAW_SAMPLES, LAW_BATCH = 2, 150, 32
# Drafters that need no training, besides those of the table: what `auto` is without heads.
COMBINED = "trigram+recycle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a certificate.

    `drafts`: those to check; empty: all that need no training and take the model. `batch_sizes` are
    those of whole texts; passes have those of `BATCHES`.
    """

    drafts: Sequence[str] = ()
    batch_sizes: Sequence[int] = (1,)
    max_new_tokens: int = 128
    sampling: SamplingParams = SAMPLING
    verification: VerifyOptions = field(default_factory=VerifyOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A record of what was run, what was found, and which promises do not hold.

    `model`: the checkpoint's fingerprint. `left_out`: drafters that this model does not take, with
    the reason. `engine`: versions, kernels, processor, threads. `tokens`: those compared in whole
    texts. `identical`: all bits, all texts and all laws were plain decoding's, promised or not.
    `promises`: what was promised, by forward, since not every arithmetic keeps the bits of a row.
    `broken`: promises that do not hold.
    """

    format_version: int
    model: str
    drafters: list[str]
    left_out: dict[str, str]
    runtime: str
    activations: str
    forward: list[str]
    engine: dict[str, Any]
    dtype: str
    kv: str
    widths: list[int]
    batch_sizes: list[int]
    prompts: int
    tokens: int
    promises: dict[str, list[str]]
    identical: bool
    broken: list[str]
    rows: list[Rows]
    texts: list[Texts]
    laws: list[Law]

    def encode(self) -> bytes:
        """Return the bytes of the certificate's file."""
        return (json.dumps(as_json(self), indent=1, allow_nan=False) + "\n").encode()


def certify(
    runner: Runner,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    reporter: Reporter = SILENT,
) -> Certificate:
    """Compare passes, texts and laws with plain decoding's. `runner` has the checkpoint's model.

    Raises:
        InputError: a drafter cannot be opened, or the context has no room for a prompt.
    """
    target, forwards = runner.target, _list_forwards(runner.target)
    drafts, left_out = _choose_drafts(runner, options.drafts)
    widths = _choose_widths(target)
    # What modules keep of a text, no batch can hold twice.
    batches = list(BATCHES) if target.state_in_cache else [1]
    room = target.context - max(*widths, options.max_new_tokens)
    if room < 1 or not prompts:
        raise UsageError(
            f"no prompt fits in the context of {target.context} tokens with "
            f"{options.max_new_tokens} new ones"
        )
    given = [list(prompt[-room:]) for prompt in prompts]
    rows, texts, laws = list[Rows](), list[Texts](), list[Law]()
    promises: dict[str, list[str]] = {}
    for forward in forwards:
        # A model's layers are computed as the target that was opened last asks for.
        target = open_target(target.model, context=target.context, kv=target.kv, forward=forward)
        runner = Runner(
            target,
            tokenizer=runner.tokenizer,
            allow_other_target=runner.allow_other_target,
            checksums=runner.checksums,
        )
        promises[forward] = _list_promises(target)
        shapes = compare_rows(
            target,
            [prompt[-ROW_PROMPT:] for prompt in given],
            widths=widths,
            batches=batches,
            forward=forward,
            seed=options.verification.seed,
        )
        compared = compare_texts(
            runner,
            drafts,
            given,
            batch_sizes=options.batch_sizes,
            max_new_tokens=options.max_new_tokens,
            verification=options.verification,
            forward=forward,
        )
        sampled = compare_laws(
            runner,
            drafts,
            given[:LAW_PROMPTS],
            samples=LAW_SAMPLES,
            batch_size=LAW_BATCH if target.state_in_cache else 1,
            sampling=options.sampling,
            verification=options.verification,
            forward=forward,
        )
        passes = sum(_count_shapes(target, batch, widths) for batch in batches)
        rows += _follow(shapes, passes, f"{forward}: passes", reporter)
        total = len(drafts) * len(options.batch_sizes) + sum(n > 1 for n in options.batch_sizes)
        texts += _follow(compared, total, f"{forward}: whole texts", reporter)
        laws += _follow(sampled, len(drafts) + 1, f"{forward}: sampled texts", reporter)
    return Certificate(
        format_version=FORMAT_VERSION,
        model=checkpoint.fingerprint(),
        drafters=drafts,
        left_out=left_out,
        runtime=describe_runtime(target.model),
        activations=precision_of(target.model),
        forward=forwards,
        engine={
            **machine.software_versions(),
            "kernels": name_library(),
            "processor": machine.processor(),
            "threads": torch.get_num_threads(),
        },
        dtype=str(target.dtype).removeprefix("torch."),
        kv=target.kv,
        widths=widths,
        batch_sizes=batches,
        prompts=len(given),
        tokens=sum(each.tokens for each in texts),
        promises=promises,
        identical=not _find_broken(dict.fromkeys(forwards, KINDS), rows, texts, laws),
        broken=_find_broken(promises, rows, texts, laws),
        rows=rows,
        texts=texts,
        laws=laws,
    )


def _list_promises(target: Target[Any]) -> list[str]:
    """Return what passes, texts and sampled texts of this target promise to be."""
    exact = target.dtype == torch.float32 and precision_of(target.model) == "exact"
    if promises_rows(target):
        return list(KINDS)
    return list(KINDS[1:] if exact else KINDS[2:])


def _find_broken(
    promises: Mapping[str, Sequence[str]],
    rows: Sequence[Rows],
    texts: Sequence[Texts],
    laws: Sequence[Law],
) -> list[str]:
    """List what is not plain decoding's, of what was promised by forward."""
    broken = []
    for forward, promised in promises.items():
        own = [each for each in rows if each.forward == forward]
        differ = sum(each.differ for each in own)
        if "rows" in promised and differ:
            total, largest = sum(each.rows for each in own), max(each.largest for each in own)
            broken.append(
                f"{forward}: {differ} of {total} rows have other logits than alone, by up to "
                f"{largest}"
            )
    for each in texts:
        if "texts" in promises[each.forward] and each.lossless and each.identical < each.prompts:
            broken.append(
                f"{each.forward}, {each.drafter}: {each.prompts - each.identical} of "
                f"{each.prompts} texts at batch size {each.batch_size} are not plain decoding's"
            )
    for law in laws:
        another = law.p_value < LEVEL / len(laws)
        if "laws" in promises[law.forward] and law.lossless and another:
            broken.append(
                f"{law.forward}, {law.drafter}: sampled texts have another law "
                f"(p = {law.p_value:.1e})"
            )
    return broken


def _list_forwards(target: Target[Any]) -> list[str]:
    """Return what is to compute the layers: what was asked for, or each way that there is."""
    if target.forward != "auto":
        return [target.forward]
    if not target.num_fused:
        return ["modules"]
    return ["modules", "fused" if not target.unfused else "auto"]


def _choose_drafts(runner: Runner, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the drafters to check, opened once to see whether they take the model."""
    if asked:
        for draft in asked:
            runner.use(draft)
        return list(dict.fromkeys(asked)), {}
    names = [
        name
        for name in methods.list_methods("drafter")
        if name not in ("none", "draft_model") and not methods.METHODS[name].trainable
    ]
    drafts, left_out = [], {}
    for name in [*names, COMBINED]:
        try:
            runner.use(name)
            drafts.append(name)
        except InputError as error:
            left_out[name] = " ".join(str(error).split())
    return drafts, left_out


def _choose_widths(target: Target[Any]) -> list[int]:
    """Return the widths of passes: those of trees that fit, or 1 where nothing is drafted."""
    if not target.takes_drafts:
        return [1]
    return [width for width in WIDTHS if width == 1 or 2 * width <= target.context]


def _count_shapes(target: Target[Any], batch: int, widths: Sequence[int]) -> int:
    return len(widths) * (1 if not target.takes_trees else 2 if batch == 1 else 3)


def _follow(found: Iterator[Any], total: int, what: str, reporter: Reporter) -> Iterator[Any]:
    """Pass on what is found, and report how far it is."""
    for done, each in enumerate(found, start=1):
        yield each
        reporter.progress(done, total, what)
