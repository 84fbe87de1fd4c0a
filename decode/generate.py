"""Continue prompts with any drafter: the library's door, and the runner that the commands keep."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.data.text import check_ids
from spectool.decode.cache import TreeCache
from spectool.decode.control.base import Control
from spectool.decode.loop import Timings, decode
from spectool.decode.policy.chain import chained
from spectool.decode.policy.curve import Curve, curve_of
from spectool.decode.policy.tuned import Tuned
from spectool.decode.protocol import Drafter
from spectool.decode.recurrent import open_target
from spectool.decode.request import FinishReason, Request
from spectool.decode.sampling import Draws, SamplingOptions, SamplingParams
from spectool.decode.spec import open_drafter, parse_spec
from spectool.decode.streaming import TextStream
from spectool.decode.verify import Verification, choose_verifier
from spectool.errors import CheckpointError, NotFinite, UsageError
from spectool.model.finite import first_not_finite, not_finite
from spectool.model.loading import load_model, load_tokenizer

# Row, its newly committed tokens, the text they release, how many of its first characters came
# from accepted drafts.
OnTokens = Callable[[int, list[int], str, int], None]


class Streamer(Protocol):
    """What transformers' `BaseStreamer` promises: tokens [1, T] of a prompt or [T], then an end."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


# Output counts as looping from the second occurrence of any run of this many tokens.
LOOP_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One prompt's continuation.

    `token_ids` are the new ones, with an end-of-text token and the token that completed a stop
    string; `text` is cut before either and continues the prompt as written. `forwards` counts
    passes of the target, the prompt's included: one a token when decoding plainly. `offered_at[d]`
    counts the steps that drafted d+1 tokens deep, `accepted_at[d]` those that committed as deep.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    forwards: int
    drafted: int
    accepted: int
    offered_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    lossless: bool = True

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / max(1, self.forwards)


class Runner:
    """A loaded model with a drafter, for any number of prompts.

    `draft` is a specification (`drafters/spec.py`), a drafter, or None for plain decoding; it may
    be replaced with `use`. `timings` is where the time of all calls went. `dtype` and `device` are
    for models given as a path.
    `allow_other_target` takes draft heads of another checkpoint. `tune` sizes trees by what pays on
    this machine also where a specification says nothing about it (`decode/policy/tuned.py`).
    `checksums`: compare artifacts and heads with theirs when they are loaded.

    Raises:
        InputError: a checkpoint that cannot be read or decoded, a specification that is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        draft: str | Drafter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        context: int | None = None,
        allow_other_target: bool = False,
        tune: bool = False,
        checksums: bool = True,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            if dtype is not None:
                raise UsageError("dtype is for a model given as a path; convert the model itself")
        else:
            tokenizer = tokenizer or load_tokenizer(model)
            model = load_model(model, dtype=dtype, device=device, checksums=checksums)
        self.target = open_target(model, context=context)
        self.tokenizer = tokenizer
        self.allow_other_target = allow_other_target
        self.checksums = checksums
        self.tune = tune
        self.drafter: Drafter
        self.use(draft)
        self.timings = Timings()
        self._cache: TreeCache | None = None

    @property
    def drafter_name(self) -> str:
        """The drafter's row in the table of methods; `auto` has become another by now."""
        return self.drafter.name

    def use(self, draft: str | Drafter | None) -> None:
        """Change the drafter."""
        drafter = self.open(draft) if draft is None or isinstance(draft, str) else draft
        # What is tuned was opened here.
        self.drafter = drafter if isinstance(drafter, Tuned) else chained(drafter, self.target)
        self.drafter.attach(self.target)

    def open(self, draft: str | None) -> Drafter:
        """The drafter of a specification, for `use`.

        Loads a draft model; runs no forward but what measures `curve`.

        Raises:
            InputError: the specification is wrong, or its checkpoint does not fit this model.
        """
        name = self.target.model.config._name_or_path
        spec = parse_spec("none" if draft is None else draft, beside=Path(name) if name else None)
        drafter = open_drafter(
            spec,
            target=self.target,
            target_tokenizer=self.tokenizer,
            allow_other_target=self.allow_other_target,
            checksums=self.checksums,
        )
        drafter = chained(drafter, self.target)
        tuned = self.tune if spec.tune is None else spec.tune
        if tuned and drafter.name != "none" and self.target.takes_drafts:
            return Tuned(drafter, self.target, self.curve)
        return drafter

    @functools.cached_property
    def curve(self) -> Curve:
        """What passes cost here; measured when first asked for, which takes up to a second."""
        return curve_of(self.target)

    def close(self) -> None:
        """Keep on disk what the drafter learnt, where it was asked to."""
        self.drafter.close()

    def verification(
        self,
        drafter: Drafter,
        *,
        verify: str | None = None,
        lossy: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Verification:
        """The rule that `generate` would verify this drafter with. Runs no forward.

        Raises:
            UsageError: a value outside its range, or a pair that is refused.
        """
        return _pair(drafter, SamplingParams(**sampling), verify, lossy)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] = 128,
        seed: int = 0,
        stop: Sequence[str] = (),
        verify: str | None = None,
        lossy: bool = False,
        batch_size: int = 1,
        eos: Collection[int] | Sequence[Collection[int]] = (),
        controls: Sequence[Sequence[Control[Any]]] = (),
        on_tokens: OnTokens | None = None,
        streamer: Streamer | None = None,
        reuse_cache: bool = False,
        keep_interrupted: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Result]:
        """Continue every prompt (text, or token ids as they are), `batch_size` at a time.

        `sampling` are the options of `sampling.SamplingParams`; without any, decoding is greedy.
        `on_tokens(i, tokens, text, drafted)` hears of prompt i's tokens as they are committed; they
        are never taken back, and the first `drafted` characters of the text came from accepted
        drafts. `streamer` is one of transformers': it is put each prompt, then the tokens of each
        step, then ended, also where the call fails; one prompt at a time. `eos` are tokens that
        end a text besides the model's own. `reuse_cache` continues from the longest common prefix
        with the single row that the call before left, as a chat does. `max_new_tokens` and `eos`
        may differ by prompt. `controls` are each prompt's own, applied after the
        penalties. With `keep_interrupted`, Ctrl-C ends the call with what is there:
        `on_tokens` hears what it has not heard yet, and the unfinished have finish_reason
        "interrupted".

        Raises:
            UsageError: a wrong or contradictory option, a prompt beyond the context.
            SpectoolError: the model's logits are NaN or infinite.
            KeyboardInterrupt: Ctrl-C without `keep_interrupted`.
        """
        with contextlib.ExitStack() as ending:
            if streamer is not None:
                # The last prompt's end: who waits for it in another thread must not wait for ever.
                ending.callback(streamer.end)
                if batch_size > 1:
                    raise UsageError("a streamer hears one prompt at a time: batch size 1")
                on_tokens = _putting(streamer, on_tokens)
            control = SamplingParams(**sampling)
            verification = _pair(self.drafter, control, verify, lossy)
            if isinstance(max_new_tokens, int):
                max_new_tokens = [max_new_tokens] * len(prompts)
            if min(max_new_tokens, default=1) < 1 or batch_size < 1:
                raise UsageError("--max-new-tokens and --batch-size must be at least 1")
            if stop and self.tokenizer is None:
                raise UsageError("stop strings need a tokenizer, and this model came without one")
            if not all(stop):
                raise UsageError("a stop string must not be empty")
            live, own_ends = on_tokens is not None, self.end_ids()
            penalties, more = control.controls(), controls or [()] * len(prompts)
            jobs = zip(prompts, max_new_tokens, _each(eos, len(prompts)), more, strict=True)
            rows = [
                self._row(
                    index,
                    prompt,
                    Draws(seed, index),
                    control,
                    (*penalties, *added),
                    limit,
                    own_ends | ends,
                    stop,
                    live,
                )
                for index, (prompt, limit, ends, added) in enumerate(jobs)
            ]
            batch_size = batch_size if self.target.keeps_rows else 1
            try:
                for group in _groups(rows, batch_size):
                    if streamer is not None:
                        if group[0].index:
                            streamer.end()
                        streamer.put(torch.tensor([group[0].tokens]))
                    cache = self._open(group, reuse_cache)
                    for commit in decode(
                        self.target, cache, self.drafter, group, verification, self.timings
                    ):
                        if on_tokens is not None:
                            commit.row.mark_reported(commit.tokens, commit.text)
                            on_tokens(commit.row.index, commit.tokens, commit.text, commit.drafted)
            except BaseException as error:
                # The pass that was under way may have left its rows half written.
                self._cache = None
                if isinstance(error, NotFinite):
                    raise self._blamed(error, rows) from error
                if not (keep_interrupted and isinstance(error, KeyboardInterrupt)):
                    raise
                for row in rows:
                    tokens, text = row.interrupt()
                    if on_tokens is not None and (tokens or text):
                        on_tokens(row.index, tokens, text, 0)
            return [_result(row, verification.lossless) for row in rows]

    def _blamed(self, error: NotFinite, rows: Sequence[Request]) -> NotFinite:
        """The same error with the place in the model where values first are NaN or infinite."""
        model = self.target.model
        for row in rows:
            if where := first_not_finite(model, torch.tensor([row.tokens])):
                return not_finite(model.config._name_or_path or self.target.name, str(error), where)
        return error

    def _open(self, rows: list[Request], reuse: bool) -> TreeCache:
        prompts = [row.tokens for row in rows]
        context, cache = rows[0].context, self._cache if reuse and self.target.keeps_rows else None
        if cache is None or len(cache.tokens) != len(rows) or cache.context != context:
            cache = self.target.cache(len(rows), context)
        cache.keep_prefix(prompts)
        self._cache = cache
        return cache

    def _row(
        self,
        index: int,
        prompt: str | Sequence[int],
        draws: Draws,
        control: SamplingParams,
        controls: Sequence[Control[Any]],
        max_new_tokens: int,
        eos: frozenset[int],
        stop: Sequence[str],
        live: bool,
    ) -> Request:
        tokens = self._encode(prompt)
        if not tokens:
            raise UsageError(f"prompt {index + 1} is empty and the model has no start token")
        if len(tokens) > self.target.context:
            raise UsageError(
                f"prompt {index + 1} has {len(tokens)} tokens; the context holds "
                f"{self.target.context}",
                hint=self.target.bound,
            )
        known = 0 if self.tokenizer is None else len(self.tokenizer)
        if isinstance(prompt, str) or 0 <= min(tokens) <= max(tokens) < known:
            place = self.target.model.config._name_or_path or self.target.name
            giver = f"{place}: its tokenizer"
        else:
            giver = f"prompt {index + 1}"
        check_ids(tokens, self.target.num_tokens, giver)
        row = Request(
            index=index,
            tokens=tokens,
            draws=draws,
            control=control,
            controls=controls,
            max_new_tokens=max_new_tokens,
            context=self.target.span(len(tokens) + max_new_tokens),
            eos=eos,
            text=TextStream(self.tokenizer, tokens, stop, live=live) if self.tokenizer else None,
        )
        row.check_room()
        return row

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise UsageError("a prompt of text needs a tokenizer; give token ids")
        tokens: list[int] = list(self.tokenizer(prompt)["input_ids"])
        if not tokens and self.tokenizer.bos_token_id is not None:
            tokens = [self.tokenizer.bos_token_id]
        return tokens

    def end_ids(self) -> frozenset[int]:
        """End-of-text ids as the generation configuration has them, else the tokenizer's.

        Raises:
            CheckpointError: they are no ids.
        """
        for holder in (self.target.model.generation_config, self.tokenizer):
            said = getattr(holder, "eos_token_id", None)
            if said is not None:
                ids = said if isinstance(said, (list, tuple)) else [said]
                if not all(type(each) is int for each in ids):
                    raise CheckpointError(
                        f"{self.target.model.config._name_or_path}: generation_config.json: "
                        f"eos_token_id is {said!r}, expected an id or a list of ids"
                    )
                return frozenset(ids)
        return frozenset()


def generate(
    model: PreTrainedModel | str | Path,
    prompts: Sequence[str | Sequence[int]],
    *,
    draft: str | Drafter | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    context: int | None = None,
    checksums: bool = True,
    max_new_tokens: int = 128,
    seed: int = 0,
    stop: Sequence[str] = (),
    verify: str | None = None,
    lossy: bool = False,
    batch_size: int = 1,
    on_tokens: OnTokens | None = None,
    streamer: Streamer | None = None,
    **sampling: Unpack[SamplingOptions],
) -> list[Result]:
    """Continue each prompt once; `Runner` and `Runner.generate` describe the options.

    Ctrl-C ends it with KeyboardInterrupt.
    """
    runner = Runner(
        model,
        draft=draft,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        context=context,
        checksums=checksums,
    )
    return runner.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=stop,
        verify=verify,
        lossy=lossy,
        batch_size=batch_size,
        on_tokens=on_tokens,
        streamer=streamer,
        **sampling,
    )


def _putting(streamer: Streamer, on_tokens: OnTokens | None) -> OnTokens:
    """The listener, and a streamer of transformers beside it."""

    def hear(row: int, tokens: list[int], text: str, drafted: int) -> None:
        if on_tokens is not None:
            on_tokens(row, tokens, text, drafted)
        if tokens:
            streamer.put(torch.tensor(tokens))

    return hear


def _each(eos: Collection[Any], num_prompts: int) -> list[frozenset[int]]:
    """The end tokens of each prompt."""
    if any(not isinstance(end, int) for end in eos):
        return [frozenset(own) for own in eos]
    return [frozenset(eos)] * num_prompts


def loop_start(tokens: Sequence[int], length: int = LOOP_TOKENS) -> int:
    """Where a run of `length` tokens that occurred before begins again; the end if nowhere."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - length + 1):
        run = tuple(tokens[start : start + length])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)


def _groups(rows: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Rows to be decoded together: in order, so many at most, all of one context."""
    for _, same in itertools.groupby(rows, key=lambda row: row.context):
        group = list(same)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _pair(
    drafter: Drafter, control: SamplingParams, verify: str | None, lossy: bool
) -> Verification:
    kinds = drafter.kinds(control)
    return choose_verifier(kinds, verify, temperature=control.temperature, lossy=lossy)


def _result(row: Request, lossless: bool) -> Result:
    assert row.finish_reason is not None
    return Result(
        token_ids=row.new_tokens,
        text=row.text.text if row.text is not None else "",
        finish_reason=row.finish_reason,
        forwards=row.forwards,
        drafted=row.drafted,
        accepted=row.accepted,
        offered_at=row.offered_at,
        accepted_at=row.accepted_at,
        lossless=lossless,
    )
