"""`spectool tune HEADS MODEL`: find the fastest draft options on this machine."""

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
    heads: Annotated[Path, typer.Argument(help="Directory of draft heads")],
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            help="File of prompts: .txt (one per line) or .jsonl (prompt, turns or messages)"
        ),
    ],
    limit: Annotated[int, typer.Option(min=1, help="Use only the first N prompts")] = 8,
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
    """Find the draft options of HEADS that are fastest on this machine, and keep them."""
    with session(json_wanted=json_output, debug=debug) as output:
        from spectool.data import text
        from spectool.decode.heads.artifact import read_record
        from spectool.evaluate import tuning

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
        inputs = text.read_prompts(
            prompts,
            tokenizer,
            field=field,
            template=template_arguments(template_arg) or None,
            limit=limit,
            reporter=output,
        )
        best = tuning.tune(runner, heads, inputs, max_new_tokens=max_new_tokens, reporter=output)
        output.show(f"{heads}: {best} here, {best.speedup:.2f} times plain decoding")
        if best.speedup < 1:
            output.say("plain decoding is faster on this machine; `--draft HEADS:tune` may choose")
        output.result({"heads": str(heads), **best.options, "speedup": best.speedup})
