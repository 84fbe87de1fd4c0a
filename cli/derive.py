"""Commands derived from their bodies: the fields of each parameter that is a `Config` are options.

A body is a function `body(output, ...)` whose other parameters are annotated with `Config` classes.
`--json` and `--debug` are added to each command; errors end it with one line and an exit code.
"""

from __future__ import annotations

import inspect
import shlex
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from spectool.cli.common import session
from spectool.options import Config, Option, command_words, options_of

# Panels of `--help` in the order in which they follow a command's own options.
PANELS = (
    "What to quantize", "Data", "Calibration", "Text", "Training", "Training before quantization",
    "Sampling", "Model", "Resources", "Output",
)  # fmt: skip


class Command(TyperCommand):
    """A command whose `--help` stands in the last panel."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option in its panel."""
        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = PANELS[-1]
        return option


def configs_of(body: Callable[..., None]) -> dict[str, type[Config]]:
    """Return the parameters of a body that hold options, with their classes."""
    hints = typing.get_type_hints(body)
    return {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and issubclass(hint, Config)
    }


def derive(
    body: Callable[..., None],
    configs: Mapping[str, type[Config]],
    *,
    words: Sequence[str],
    own: str | None = None,
    **fixed: Any,
) -> Callable[..., None]:
    """Return a function for typer that runs a body with the options of its `configs`.

    `words`: those after `spectool` that name the command. `own`: title of the options without a
    panel. `fixed`: further arguments of the body.
    """

    def run(**values: Any) -> None:
        json_wanted, debug = values.pop("json"), values.pop("debug")
        with session(json_wanted=json_wanted, debug=debug) as output:
            arguments = {
                name: config(
                    **{
                        option.name: _value(option, values[option.name])
                        for option in options_of(config)
                    }
                )
                for name, config in configs.items()
            }
            given = command_words(*arguments.values())
            output.command = shlex.join(["spectool", *words, *given])
            body(output, **fixed, **arguments)

    options = [option for config in configs.values() for option in options_of(config)]
    parameters = [_parameter(option, own) for option in _in_order(options)]
    for name, line in (
        ("json", "Print one JSON object to stdout"),
        ("debug", "Show the traceback of an error"),
    ):
        flag = typer.Option(f"--{name}", help=line, rich_help_panel=PANELS[-1])
        parameters.append(_keyword(name, Annotated[bool, flag], False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = body.__doc__
    return run


def _in_order(options: Iterable[Option]) -> list[Option]:
    """Sort options by panel: arguments first, then a command's own options."""
    order = {panel: index for index, panel in enumerate(PANELS, start=1)}
    return sorted(
        options, key=lambda option: -1 if option.argument else order.get(option.panel or "", 0)
    )


def _parameter(option: Option, own: str | None) -> inspect.Parameter:
    """Return the parameter that typer makes the option of."""
    default: Any = inspect.Parameter.empty if option.default is ... else option.default
    hint: Any = option.type
    if option.repeats and option.argument:
        hint = list[str]
    elif option.repeats:
        hint, default = list[str] | None, None
    elif option.many:
        hint, default = str, option.format(default)
    elif option.optional:
        hint = hint | None
    if option.argument:
        return _keyword(option.name, Annotated[hint, typer.Argument(help=_help(option))], default)
    # A switch is read as whether it was given.
    flags = [option.flag] if option.switch or option.short else []
    flags += [option.short] if option.short else []
    declared = typer.Option(*flags, help=_help(option), rich_help_panel=option.panel or own)
    return _keyword(option.name, Annotated[hint, declared], False if option.switch else default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _value(option: Option, given: Any) -> Any:
    """Return the option's value for what typer read."""
    if option.repeats:
        return tuple(given or ())
    if option.many:
        return option.parse(given)
    if option.switch:
        return given != option.default
    return given


def _help(option: Option) -> str:
    text = option.help[0].upper() + option.help[1:]
    if len(option.choices) > 1:
        text += f" ({', '.join(map(str, option.choices))})"
    elif option.minimum is not None and option.maximum is not None:
        text += f" ({option.minimum:g} to {option.maximum:g})"
    return text
