"""`spectool generate MODEL`: continue prompts, with any drafter."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from spectool.cli.common import (
    AllowOtherTarget,
    Ban,
    BatchSize,
    Context,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    LogitBias,
    Lossy,
    MaxNewTokens,
    MinP,
    Model,
    NoChecksums,
    NoRepeatNgramSize,
    RepetitionPenalty,
    Revision,
    Runtime,
    Seed,
    Temperature,
    TemplateArg,
    Threads,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
    open_runner,
    read_prompts,
    session,
)
from spectool.errors import Interrupted


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt to continue; repeatable")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts: .txt (one per line) or .jsonl")
    ] = None,
    draft: Annotated[
        str,
        typer.Option(
            help="Drafter, directory of draft heads or smaller checkpoint: NAME[:key=value,...]"
        ),
    ] = "auto",
    max_new_tokens: MaxNewTokens = 128,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop the output before this text; repeatable")
    ] = None,
    batch_size: BatchSize = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    logit_bias: LogitBias = None,
    ban: Ban = None,
    verify: Verify = None,
    lossy: Lossy = False,
    context: Context = None,
    allow_other_target: AllowOtherTarget = False,
    field: Field = None,
    template_arg: TemplateArg = None,
    dtype: Dtype = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from prompts given as options, in a file or on stdin."""
    with session(json_wanted=json_output, debug=debug) as output:
        runner, tokenizer = open_runner(
            output,
            model,
            draft=draft,
            dtype=dtype,
            device=device,
            runtime=runtime,
            context=context,
            threads=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
            checksums=not no_checksums,
            allow_other_target=allow_other_target,
            tune=True,
        )
        from spectool.decode.sampling import SamplingOptions

        sampling = SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
        inputs = read_prompts(
            output, tokenizer, prompt=prompt, prompts=prompts, field=field, template=template_arg
        )
        controls = runner.make_controls(logit_bias=logit_bias or (), ban=ban or ())
        streams = not json_output and batch_size == 1
        began = time.perf_counter()
        shown = -1

        def on_tokens(index: int, tokens: list[int], text: str, drafted: int) -> None:
            nonlocal shown
            if index != shown:
                sys.stdout.write(_opening(inputs[index].given, tokenizer, first=shown < 0))
                shown = index
            sys.stdout.write(text)
            sys.stdout.flush()

        results = runner.generate(
            [one.given for one in inputs],
            eos=[one.ends for one in inputs],
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop or (),
            verify=verify,
            lossy=lossy,
            batch_size=batch_size,
            controls=[controls] * len(inputs),
            on_tokens=on_tokens if streams else None,
            keep_interrupted=True,
            **sampling,
        )
        seconds = time.perf_counter() - began
        runner.close()
        if not (streams or json_output):
            for index, result in enumerate(results):
                opening = _opening(inputs[index].given, tokenizer, first=index == 0)
                sys.stdout.write(f"{opening}{result.text}")
        if not json_output:
            sys.stdout.write("\n")
        new_tokens = sum(len(result.token_ids) for result in results)
        forwards = sum(result.forwards for result in results)
        lossless = all(result.lossless for result in results)
        output.say(
            f"{new_tokens} tokens, {new_tokens / seconds:.1f} tok/s, "
            f"{new_tokens / max(1, forwards):.2f} tokens per forward, drafter {runner.drafter_name}"
            f"{'' if lossless else ', lossy'}"
        )
        output.result(
            {
                "results": [
                    {
                        "text": result.text,
                        "token_ids": result.token_ids,
                        "forwards": result.forwards,
                        "drafted": result.drafted,
                        "accepted": result.accepted,
                        "finish_reason": result.finish_reason,
                    }
                    for result in results
                ],
                "new_tokens": new_tokens,
                "seconds": seconds,
                "tokens_per_second": new_tokens / seconds,
                "forwards": forwards,
                "tokens_per_forward": new_tokens / max(1, forwards),
                "drafter": runner.drafter_name,
                "lossless": lossless,
            }
        )
        if any(result.finish_reason == "interrupted" for result in results):
            raise Interrupted("interrupted; the text generated so far is above")


def _opening(prompt: str | list[int], tokenizer: Any, *, first: bool) -> str:
    """Return the prompt's text, which is written before its continuation."""
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    return text if first else f"\n{text}"
