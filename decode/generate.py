"""Continue prompts with any drafter: `generate`, and the `Runner` that the commands use."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.control.ban import BannedText, Vocabulary, token_bytes
from spectool.decode.control.base import Control
from spectool.decode.control.bias import LogitBias, parse_biases
from spectool.decode.engine import Engine, Timings
from spectool.decode.options import DecodingOptions, RequestOptions, SamplingOptions, SamplingParams
from spectool.decode.policy.base import Policy
from spectool.decode.policy.chain import Chains
from spectool.decode.policy.costs import Costs, Paced
from spectool.decode.policy.tuned import Tuned
from spectool.decode.prompts import encode_checked, list_end_ids
from spectool.decode.protocol import Drafter
from spectool.decode.request import Request
from spectool.decode.result import OnTokens, Report, Result, Streamer
from spectool.decode.sampling import Draws
from spectool.decode.spec import open_drafter, parse_spec
from spectool.decode.streaming import TextStream
from spectool.decode.target.base import Target
from spectool.decode.target.open import open_target
from spectool.decode.verify import Verification, choose_verifier
from spectool.errors import NotFinite, UsageError
from spectool.model.finite import first_not_finite, not_finite
from spectool.model.loading import load_model, load_tokenizer


class Runner:
    """A loaded model with a drafter, for any number of prompts.

    `model` is a path, a model or a target, which has its own `context` and `kv` already.
    `draft` is a specification (`decode/spec.py`), a drafter, or None for plain decoding; `use`
    replaces it. `dtype` and `device` are for models given as a path. `kv` names the store of keys
    and values (`decode/kv/`): `dense`, `int8`, `int8:group=64`. `allow_other_target` accepts draft
    heads of another checkpoint. `tune` sizes trees by what passes cost on this machine
    (`decode/policy/tuned.py`) also where a specification does not ask for it. `choose_threads`:
    steps may use one thread in place of torch's number, where that is faster
    (`decode/policy/costs.py`). `checksums`: compare artifacts and heads with their checksums when
    they are loaded. `timings` sums the seconds of all calls.

    Raises:
        InputError: a checkpoint that cannot be read or decoded, a specification that is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel | Target[Any] | str | Path,
        *,
        draft: str | Drafter | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        context: int | None = None,
        kv: str = "dense",
        forward: str = "auto",
        allow_other_target: bool = False,
        tune: bool = False,
        choose_threads: bool = False,
        checksums: bool = True,
    ) -> None:
        if isinstance(model, (PreTrainedModel, Target)):
            if dtype is not None:
                raise UsageError("dtype is for a model given as a path; convert the model itself")
        else:
            checkpoint = open_checkpoint(model, checksums=checksums, seq2seq=True)
            tokenizer = tokenizer or load_tokenizer(checkpoint)
            model = load_model(checkpoint, dtype=dtype, device=device)
        self.target: Target[Any]
        if isinstance(model, Target):
            if context is not None or kv != "dense" or forward != "auto":
                raise UsageError(
                    "context, kv and forward are for a model; open the target with them"
                )
            self.target = model
        else:
            self.target = open_target(model, context=context, kv=kv, forward=forward)
        self.tokenizer = tokenizer
        self.allow_other_target = allow_other_target
        self.checksums = checksums
        self.tune = tune
        self.choose_threads = choose_threads
        self.drafter: Drafter
        self.use(draft)
        self.timings = Timings()
        self._engine: Engine | None = None

    @property
    def drafter_name(self) -> str:
        """Return the drafter's name in the table of methods; `auto` is resolved."""
        return self.drafter.name

    def use(self, draft: str | Drafter | None) -> None:
        """Replace the drafter."""
        if draft is None or isinstance(draft, str):
            draft = self.open(draft)
        elif not draft.policies:
            draft.policies = self._choose_policies(draft, tune=False)
        if self.target.why_lossy and draft.name != "none":
            raise UsageError(
                f"{draft.name} cannot draft where two models take turns", hint="leave out --draft"
            )
        self.drafter = draft
        self.drafter.attach(self.target)

    def open(self, draft: str | None) -> Drafter:
        """Open the drafter of a specification, for `use`.

        Loads draft heads or a draft model; runs no forward.

        Raises:
            InputError: the specification is wrong, or its checkpoint does not fit this model.
        """
        name = self.target.model.config._name_or_path
        spec = parse_spec(
            "none" if draft is None else draft, target_dir=Path(name) if name else None
        )
        drafter = open_drafter(
            spec,
            target=self.target,
            target_tokenizer=self.tokenizer,
            allow_other_target=self.allow_other_target,
            checksums=self.checksums,
        )
        tune = self.tune if spec.tune is None else spec.tune
        # Text that holds tokens which the verifier would reject would depend on time.
        lossy = {"forced", "judged"} & set(drafter.kinds(SamplingParams()))
        fixed = drafter.name == "none" or bool(lossy)
        drafter.policies = self._choose_policies(drafter, tune=tune and not fixed)
        return drafter

    def _choose_policies(self, drafter: Drafter, *, tune: bool) -> list[Policy]:
        """Return what sizes a drafter's drafts for this target."""
        target, policies = self.target, list[Policy]()
        for part in drafter.parts:
            if target.start_ids and not part.takes_sources:
                raise UsageError(
                    f"{part.name} cannot draft for {target.name}: it does not know an "
                    "encoder-decoder's source",
                    hint="--draft copy, ngram, trigram or recycle",
                )
        if not target.takes_trees:
            drafter.check_chains(target.name)
            policies.append(Chains(cuts=drafter.can_be_cut, takes_drafts=target.takes_drafts))
        note = f"{target.name}: {target.why_plain}; decoding plainly"
        if not target.takes_drafts and drafter.name != "none" and note not in target.notes:
            target.notes.append(note)
        if tune and target.takes_drafts:
            policies.append(Tuned(self.costs, cuts=drafter.can_be_cut))
        elif self.choose_threads and not target.why_lossy and self.costs.chooses:
            policies.append(Paced(self.costs))
        return policies

    @property
    def is_tuned(self) -> bool:
        """Return whether trees are sized by what passes cost."""
        return any(policy.tunes for policy in self.drafter.policies)

    @functools.cached_property
    def costs(self) -> Costs:
        """Return what steps cost, as far as it is known."""
        return Costs(self.target, choose_threads=self.choose_threads)

    def close(self) -> None:
        """Write the drafter's statistics to disk, where the specification asks for it."""
        for policy in self.drafter.policies:
            policy.close()
        self.drafter.close()

    def verification(
        self,
        drafter: Drafter,
        sampling: SamplingParams,
        *,
        verify: str | None = None,
        lossy: bool = False,
    ) -> Verification:
        """Return the verifier that `generate` would use for this drafter. Runs no forward.

        Raises:
            UsageError: a refused pair of drafter and verifier.
        """
        kinds = drafter.kinds(sampling)
        chosen = choose_verifier(kinds, verify, temperature=sampling.temperature, lossy=lossy)
        return replace(chosen, lossless=False) if self.target.why_lossy else chosen

    def make_controls(self, request: RequestOptions) -> list[Control[Any]]:
        """Return the controls that options describe, for `generate(controls=...)`.

        Raises:
            UsageError: a bias that is no pair, an empty text, a ban without a tokenizer.
        """
        found: list[Control[Any]] = []
        if request.logit_bias:
            biases = parse_biases(request.logit_bias, num_tokens=self.target.num_tokens)
            found.append(LogitBias(biases))
        if request.ban:
            if self.tokenizer is None:
                raise UsageError("--ban needs a tokenizer, and this model came without one")
            vocabulary = Vocabulary(token_bytes(self.tokenizer))
            found += [BannedText(text, vocabulary) for text in request.ban]
        return found

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] = 128,
        batch_size: int = 1,
        eos: Collection[int] | Sequence[Collection[int]] = (),
        controls: Sequence[Sequence[Control[Any]]] = (),
        on_tokens: OnTokens | None = None,
        streamer: Streamer | None = None,
        reuse_cache: bool = False,
        keep_interrupted: bool = False,
        **options: Unpack[DecodingOptions],
    ) -> list[Result]:
        """Continue every prompt (text, or token ids as they are), `batch_size` at a time.

        `options` are those of `make_request`; without any, decoding is greedy. `on_tokens` (see
        `OnTokens`) and `streamer`, one of transformers', hear of tokens as they are committed; no
        commit is ever undone. A streamer takes one prompt at a time; its `end` is called after each
        and also where the call fails. `eos` are tokens that end a text besides the model's own.
        `controls` are each prompt's own (`decode/control`), applied after the penalties.
        `max_new_tokens`, `eos` and `controls` may differ by prompt. `reuse_cache` continues from
        the longest common prefix with the single request that the call before left, as a chat does.
        With `keep_interrupted`, Ctrl-C ends the call and returns what is there: `on_tokens` is
        called with what it did not get yet, and unfinished results have finish_reason
        "interrupted".

        Raises:
            UsageError: a wrong option, a prompt beyond the context, or `engine` has requests.
            SpectoolError: NaN or infinite logits, or a request's controls exclude every token.
            KeyboardInterrupt: Ctrl-C without `keep_interrupted`.
        """
        with contextlib.closing(Report(on_tokens, streamer)) as report:
            if streamer is not None and batch_size > 1:
                raise UsageError("a streamer takes one prompt at a time: set batch size 1")
            count = len(prompts)
            limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens
            ends: Any = [eos] * count if all(isinstance(end, int) for end in eos) else eos
            columns = zip(prompts, limits, ends, controls or [()] * count, strict=True)
            requests = [
                self.make_request(
                    prompt,
                    index=index,
                    max_new_tokens=limit,
                    eos=its_ends,
                    controls=own,
                    live=on_tokens is not None or streamer is not None,
                    **options,
                )
                for index, (prompt, limit, its_ends, own) in enumerate(columns)
            ]
            try:
                self._run(requests, batch_size, report, reuse_cache)
            except KeyboardInterrupt:
                if not keep_interrupted:
                    raise
                for request in requests:
                    report(request, *request.interrupt(), 0)
            return [Result.of(request) for request in requests]

    def engine(self, batch_size: int = 1) -> Engine:
        """Return the engine of the drafter in use, for requests made elsewhere.

        `generate` decodes with it too, so not before the last of these requests has ended.

        Raises:
            UsageError: the engine of the drafter that was replaced still has requests.
        """
        if batch_size < 1:
            raise UsageError("--batch-size must be at least 1")
        if self._engine is None or self._engine.drafter is not self.drafter:
            self._check_idle()
            self._close_engine()
            self._engine = Engine(self.target, self.drafter, self.timings)
        self._engine.batch_size = batch_size
        return self._engine

    def _check_idle(self) -> None:
        """Raise UsageError if the engine has requests, whose events would be lost."""
        if self._engine is not None and self._engine.busy:
            raise _busy_engine()

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _run(
        self, requests: Sequence[Request], batch_size: int, report: Report, reuse_cache: bool
    ) -> None:
        """Decode requests to their ends; with a streamer, one after the other."""
        self._check_idle()
        engine, own = self.engine(batch_size), set(requests)
        try:
            for group in [[each] for each in requests] if report.streamer else [requests]:
                for request in group:
                    report.begin(request)
                    engine.submit(request, continues=reuse_cache)
                while engine.busy:
                    for event in engine.step():
                        if event.request not in own:
                            raise _busy_engine()
                        report(event.request, event.tokens, event.text, event.drafted)
                        if event.error is not None:
                            raise event.error
        except BaseException as error:
            # The interrupted step may have left the cache half written.
            self._close_engine()
            if isinstance(error, NotFinite):
                raise self._locate_not_finite(error, requests) from error
            raise

    def _locate_not_finite(self, error: NotFinite, requests: Sequence[Request]) -> NotFinite:
        """Return the error extended by the first module whose output is NaN or infinite."""
        model = self.target.model
        for request in requests:
            read = [request.source, request.tokens] if request.source else [request.tokens]
            if where := first_not_finite(model, *(torch.tensor([ids]) for ids in read)):
                return not_finite(model.config._name_or_path or self.target.name, str(error), where)
        return error

    def end_ids(self) -> frozenset[int]:
        """Return the tokens that end a text: see `list_end_ids`."""
        return list_end_ids(self.target, self.tokenizer)

    def make_request(
        self,
        prompt: str | Sequence[int],
        *,
        index: int = 0,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop: Sequence[str] = (),
        eos: Collection[int] = (),
        controls: Sequence[Control[Any]] = (),
        verify: str | None = None,
        lossy: bool = False,
        live: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """Make the request of one prompt, for `engine`.

        It draws the random numbers of `seed` and `index`. Not `live`, its text is decoded at its
        end alone. `sampling` are the options of `SamplingParams`.

        Raises:
            UsageError: a wrong option, or the prompt is empty or longer than the context.
            CheckpointError: a token id that the model does not have.
        """
        if max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be at least 1")
        if stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this model came without one")
        if not all(stop):
            raise UsageError("a stop string must not be empty")
        params = SamplingParams(**sampling)
        tokens, source = encode_checked(prompt, index + 1, self.target, self.tokenizer), list[int]()
        if self.target.start_ids:
            tokens, source = list(self.target.start_ids), tokens
        request = Request(
            index=index,
            tokens=tokens,
            source=source,
            draws=Draws(seed, index),
            sampling=params,
            controls=(*params.controls(), *controls),
            max_new_tokens=max_new_tokens,
            context=self.target.span(len(tokens) + max_new_tokens),
            eos=self.end_ids() | frozenset(eos),
            text=TextStream(self.tokenizer, tokens, stop, live=live) if self.tokenizer else None,
            verification=self.verification(self.drafter, params, verify=verify, lossy=lossy),
        )
        is_forced = "forced" in self.drafter.kinds(params)
        if request.controls and is_forced and not self.drafter.applies_controls:
            raise UsageError(
                "a cap accepts tokens that bans, biases and penalties would not",
                hint="leave the cap of the drafter out",
            )
        request.finish_if_full()
        return request


def _busy_engine() -> UsageError:
    return UsageError(
        "the runner's engine has requests of its own", hint="step it until it is not busy"
    )


def generate(
    model: PreTrainedModel | str | Path,
    prompts: Sequence[str | Sequence[int]],
    *,
    draft: str | Drafter | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    context: int | None = None,
    kv: str = "dense",
    forward: str = "auto",
    checksums: bool = True,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    on_tokens: OnTokens | None = None,
    streamer: Streamer | None = None,
    **options: Unpack[DecodingOptions],
) -> list[Result]:
    """Continue each prompt once; `Runner` and `Runner.generate` describe the options.

    Ctrl-C ends the call with KeyboardInterrupt.
    """
    runner = Runner(
        model,
        draft=draft,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        context=context,
        kv=kv,
        forward=forward,
        checksums=checksums,
    )
    return runner.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_tokens=on_tokens,
        streamer=streamer,
        **options,
    )
