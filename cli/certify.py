"""`spectool bench MODEL --certify FILE`: check that drafting changes nothing, and write it down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectool.cli.bench_tables import certificate_table
from spectool.cli.common import Output, open_runner, read_prompts
from spectool.decode.options import RunnerOptions, SamplingParams, VerifyOptions
from spectool.errors import UsageError
from spectool.shared_options import TextOptions

if TYPE_CHECKING:
    from spectool.cli.bench import BenchOptions
    from spectool.evaluate.certificate import Certificate
    from spectool.evaluate.certify.rows import Rows


def certify(
    output: Output,
    options: BenchOptions,
    text: TextOptions,
    verification: VerifyOptions,
    sampling: SamplingParams,
    load: RunnerOptions,
) -> None:
    """Check a model's losslessness, and write and print the certificate."""
    from spectool.checkpoint.artifact import attach_file, find_listing
    from spectool.checkpoint.headers import CERTIFICATE
    from spectool.decode.prompts import encode
    from spectool.evaluate import certificate as module
    from spectool.evaluate.results import as_json
    from spectool.evaluate.speed_protocols import most_new_tokens
    from spectool.files import replacing

    assert options.certify is not None and options.prompts is not None
    if options.attach:
        find_listing(Path(load.model))
    if not options.certify.parent.is_dir():
        raise UsageError(f"--certify {options.certify}: no such folder: {options.certify.parent}")
    runner, tokenizer = open_runner(output, load, seq2seq=True)
    given = read_prompts(
        output,
        options.prompts,
        tokenizer,
        text,
        limit=options.limit,
        per_category=options.per_category,
    )
    found = module.certify(
        runner,
        load.open(seq2seq=True),
        [encode(prompt.given, tokenizer) for prompt in given],
        module.Options(
            drafts=options.draft,
            batch_sizes=tuple(dict.fromkeys(options.batch_size)),
            max_new_tokens=options.max_new_tokens or most_new_tokens(None),
            sampling=module.Options().sampling if sampling.greedy else sampling,
            verification=verification,
        ),
        reporter=output,
    )
    data = found.encode()
    with replacing(options.certify) as temporary:
        temporary.write_bytes(data)
    output.say(f"certificate: {options.certify}")
    if options.attach:
        attach_file(Path(load.model), CERTIFICATE, data)
        output.say(f"attached: {Path(load.model) / CERTIFICATE}")
    for line in _lines(found):
        output.show(line)
    output.show(certificate_table(found))
    output.result(as_json(found), measured=True)
    if found.broken:
        output.say(f"error: promised and not kept: {'; '.join(found.broken)}")
        raise typer.Exit(3)


def _lines(found: Certificate) -> Iterator[str]:
    """Yield the lines about the model and its rows."""
    yield f"{found.runtime}, {found.activations} activations, {found.dtype}, kv {found.kv}"
    for name, reason in found.left_out.items():
        yield f"{name}: left out: {reason}"
    for forward in found.forward:
        rows = [each for each in found.rows if each.forward == forward]
        yield f"layers by {forward}: {_describe_rows(rows)}"
        for width in found.widths:
            own = [each for each in rows if each.width == width]
            if any(each.differ for each in own):
                yield f"passes of {width} nodes: {_count(own)}"
        yield f"promised: {', '.join(found.promises[forward])}"


def _describe_rows(rows: Sequence[Rows]) -> str:
    widths, batches = [each.width for each in rows], [each.batch for each in rows]
    return (
        f"passes of {min(widths)} to {max(widths)} nodes of {min(batches)} to {max(batches)} "
        f"texts: {_count(rows)}"
    )


def _count(rows: Sequence[Rows]) -> str:
    """Say how many rows differ from passes of one node, and by how much."""
    differ, total = sum(each.differ for each in rows), sum(each.rows for each in rows)
    by = f", by up to {max(each.largest for each in rows):.3g}" if differ else ""
    return f"{differ} of {total} rows have other logits than alone{by}"
