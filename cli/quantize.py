"""`spectool quantize METHOD MODEL OUT`: a subcommand a method, its options from its dataclass."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectool import methods
from spectool.cli.common import (
    Debug,
    Device,
    Field,
    Json,
    Model,
    Output,
    Revision,
    Seed,
    TemplateArg,
    Threads,
    TrustRemoteCode,
    prepare_torch,
    session,
    size,
    template_arguments,
)
from spectool.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from spectool.options import Option
    from spectool.quantize.plan import Plan
    from spectool.quantize.run import Report
    from spectool.skeleton import Skeleton


class MethodCommand(TyperCommand):
    """A method's subcommand. Its options are looked up, and torch imported, only on use."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return command(self.name).make_context(info_name, args, parent=parent, **extra)


class MethodGroup(TyperGroup):
    """The quantizers of the methods table as subcommands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in methods.names("quantizer")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = methods.METHODS.get(cmd_name)
        if found is None or found.kind != "quantizer":
            return None
        return MethodCommand(name=cmd_name, help=found.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = None
            if Path(name).exists() or "/" in name:
                hint = f"the method comes first: spectool quantize METHOD {name} OUT"
            with session():
                try:
                    methods.row(name, "quantizer")
                except UsageError as error:
                    raise UsageError(str(error), hint=hint or error.hint) from None
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=MethodGroup,
    help="Compress a checkpoint: spectool quantize METHOD MODEL OUT.",
    no_args_is_help=True,
    subcommand_metavar="METHOD MODEL OUT",
)


@app.callback()
def _group() -> None:
    pass


def command(name: str) -> Any:
    """The click command of one method: the shared options and those of its `Config`."""
    options = _options(name)

    def run(**values: Any) -> None:
        own = {option.name: values.pop(option.name) for option in options}
        quantize(name, own, **values)

    shared = inspect.signature(quantize, eval_str=True).parameters
    parameters = [shared[key] for key in shared if key not in ("method", "own")]
    parameters += [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[_annotation(option), _typer_option(option, name)],
        )
        for option in options
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = methods.row(name, "quantizer").summary
    single = typer.Typer(add_completion=False)
    single.command(name)(run)
    return typer.main.get_command(single)


def _options(name: str) -> list[Option]:
    from spectool.options import options_of

    return list(options_of(methods.resolve(name, "quantizer").Config))


def _annotation(option: Option) -> Any:
    return option.type | None if option.optional else option.type


def _typer_option(option: Option, method: str) -> Any:
    return typer.Option(help=_help(option), rich_help_panel=f"Options of {method}")


def _help(option: Option) -> str:
    text = option.help[0].upper() + option.help[1:]
    if option.choices:
        text += f" ({', '.join(map(str, option.choices))})"
    elif option.minimum is not None and option.maximum is not None:
        text += f" ({option.minimum} to {option.maximum})"
    return text + "."


def quantize(
    method: str,
    own: dict[str, Any],
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to make; must not exist.")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate on: .txt, .jsonl, .parquet (.gz, .xz), hub:DATASET; "
            "repeatable. Methods that need none use it to measure output errors."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a calibration sequence.")] = 2048,
    field: Field = None,
    template_arg: TemplateArg = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave linears of this name or glob dense; repeatable."),
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Accept over 10% of block weights left dense.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; read headers only, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT once the new one is whole.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 4,
    dtype: Annotated[
        str, typer.Option(help="What calibration computes in: float32, bfloat16, float16.")
    ] = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into the directory OUT."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(threads)
        from spectool import hub
        from spectool.headers import read_layout
        from spectool.loading import check_device, parse_dtype
        from spectool.quantize import run

        job = run.Job(
            method=method,
            config=methods.resolve(method, "quantizer").Config.from_dict(own),
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            text_field=field,
            template=template_arguments(template_arg),
            skip=skip or (),
            allow_dense=allow_dense,
            seed=seed,
        )
        check_device(device)
        if dry_run:
            layout = (
                read_layout(Path(model))
                if hub.is_local(model)
                else hub.remote_layout(model, revision)
            )
            skeleton, plan = run.prepare(
                layout, job, trust_remote_code=trust_remote_code, device=device
            )
            show_plan(output, job, plan, skeleton)
            output.result({"dry_run": True, "method": method, **_planned(plan)})
            return
        compute = parse_dtype(dtype)
        assert compute is not None
        try:
            report = run.quantize(
                model,
                out,
                job,
                device=device,
                dtype=compute,
                batch_size=batch_size,
                overwrite=overwrite,
                revision=revision,
                trust_remote_code=trust_remote_code,
                announce=lambda plan, skeleton: show_plan(output, job, plan, skeleton),
                progress=lambda done, total, name: output.progress(done, total, "blocks packed"),
            )
        except KeyboardInterrupt:
            again = "the same command goes on after the last whole block"
            raise Interrupted("interrupted", hint=again) from None
        finish(output, method, out, report)


def show_plan(output: Output, job: Any, plan: Plan, skeleton: Skeleton) -> None:
    """The plan for people, before anything is done."""
    num_sites = sum(map(len, plan.sites.values()))
    options = ", ".join(f"{key}={value}" for key, value in job.config.as_dict().items())
    output.say(
        f"plan: {job.method}{f' ({options})' if options else ''} on {num_sites} linears in "
        f"{len(plan.sites)} blocks of {skeleton.config.model_type}, "
        f"{plan.num_weights / 1e6:.2f} M of {plan.num_parameters / 1e6:.2f} M parameters"
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        output.say(f"plan: {len(names)} left dense ({reason}): {names[0]}, …")
    output.say("plan: everything outside the blocks is copied")
    buffers = plan.num_buffers * plan.buffer_bytes
    calibrated = f", activations {size(buffers)}" if buffers else ""
    device = f", device {size(plan.device_bytes)}" if plan.device_bytes else ""
    output.say(
        f"plan: disk {size(plan.file_bytes)}, memory at most {size(plan.host_bytes)}"
        f"{calibrated}{device}"
    )
    output.say(
        f"plan: expected bits per weight: {plan.bits_linears:.3f} of the linears, "
        f"{plan.bits_file:.3f} of the file"
    )
    output.start()


def _planned(plan: Plan) -> dict[str, Any]:
    return {
        "expected_bits_per_weight": {"linears": plan.bits_linears, "file": plan.bits_file},
        "disk_bytes": plan.file_bytes,
        "host_bytes": plan.host_bytes,
        "device_bytes": plan.device_bytes,
        "linears": [name for block in plan.sites.values() for name in block],
        "skipped": [{"name": name, "reason": why} for name, why in plan.skipped.items()],
    }


def finish(output: Output, method: str, out: Path, report: Report) -> None:
    """The figures users ask for, measured from the written files."""
    from spectool.headers import read_layout
    from spectool.machine import peak_rss_bytes
    from spectool.quantize.ledger import measure

    layout = read_layout(out)
    ledger = measure(layout)
    seconds = time.monotonic() - output.began
    worst = max(report.layers, key=lambda layer: layer["error"])
    output.show(
        f"{out}: {size(ledger.file_bytes)}, {ledger.linears:.3f} bits per weight of the linears, "
        f"{ledger.file:.3f} of the file"
    )
    output.show(
        f"largest relative squared error of a linear: {worst['error']:.2e} ({worst['name']})"
    )
    data_free = [name for block in report.blocks for name in block["data_free"]]
    if data_free:
        output.show(
            f"matrices with too few calibration tokens, packed without data: {len(data_free)} "
            f"({data_free[0]}, …)"
        )
    fits = [block["fit"] for block in report.blocks if block["fit"]]
    if fits:
        show_fits(output, fits)
    output.show(f"{seconds:.1f} s, peak memory {size(peak_rss_bytes())}")
    output.result(
        {
            "out": str(out),
            "method": method,
            "bits_per_weight": {"linears": ledger.linears, "file": ledger.file},
            "bytes": ledger.file_bytes,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "layers": report.layers,
            "blocks": [
                {key: block.get(key) for key in ("output_error", "data_free", "fit")}
                for block in report.blocks
            ],
        }
    )


def show_fits(output: Output, fits: list[dict[str, Any]]) -> None:
    """What the fits of the blocks gained."""
    shares = [fit["loss_after"] / fit["loss_start"] for fit in fits]
    lower = sum(share < 1 for share in shares)
    output.show(
        f"block loss after the fit: {min(shares):.3f} to {max(shares):.3f} of that at its start, "
        f"lower in {lower} of {len(fits)} blocks"
    )
    flipped = sum(fit["rows_flipped"] for fit in fits)
    if flipped:
        output.show(f"rows flipped by a negative scale: {flipped}")
    turned = [index for index, fit in enumerate(fits) if fit["least_cosine"] <= 0]
    if turned:
        output.show(
            "[yellow]warning[/yellow]: the output points away from the original's on some "
            f"calibration text, in blocks {', '.join(map(str, turned))}"
        )
