"""`spectool tune HEADS MODEL`: how much to draft on this machine, kept with the heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectool.cli.common import (
    AllowOtherTarget,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    MaxNewTokens,
    Model,
    NoChecksums,
    Revision,
    Runtime,
    TemplateArg,
    Threads,
    TrustRemoteCode,
    open_runner,
    session,
    template_arguments,
)


def tune(
    heads: Annotated[Path, typer.Argument(help="Heads directory; what is found is kept in it.")],
    model: Model,
    prompts: Annotated[
        str, typer.Option(help="Prompts: .txt (one a line) or .jsonl (prompt, turns, messages).")
    ],
    limit: Annotated[int, typer.Option(min=1, help="Only the first N prompts.")] = 8,
    max_new_tokens: MaxNewTokens = 64,
    allow_other_target: AllowOtherTarget = False,
    field: Field = None,
    template_arg: TemplateArg = None,
    dtype: Dtype = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Find the options of HEADS that are fastest on this machine, and keep them there."""
    with session(json_wanted=json_output, debug=debug) as output:
        from spectool.data import text
        from spectool.decode.heads.artifact import read_record
        from spectool.evaluate import tuning as room

        read_record(heads)
        runner, tokenizer = open_runner(
            output,
            model,
            draft=None,
            dtype=dtype,
            device=device,
            runtime=runtime,
            context=None,
            threads=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
            checksums=not no_checksums,
            allow_other_target=allow_other_target,
        )
        found = text.read_prompts(
            prompts,
            tokenizer,
            field=field,
            template=template_arguments(template_arg) or None,
            limit=limit,
            on_read=output.note,
        )
        best = room.tune(
            runner,
            heads,
            [prompt.given for prompt in found],
            ends=[prompt.ends for prompt in found],
            max_new_tokens=max_new_tokens,
            say=output.say,
        )
        options = ",".join(f"{key}={value}" for key, value in best.items() if key != "speedup")
        output.show(f"{heads}: {options} here, {best['speedup']:.2f} times plain decoding")
        if best["speedup"] < 1:
            output.say("plain decoding is faster on this machine; `--draft HEADS:tune` may choose")
        output.result({"heads": str(heads), **best})
