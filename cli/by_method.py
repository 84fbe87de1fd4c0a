"""Commands with one subcommand per method, whose options come from the method's dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectool import methods
from spectool.cli.common import session
from spectool.errors import UsageError

if TYPE_CHECKING:
    from spectool.options import Config, Option


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A command with one subcommand for each method of a kind.

    `run(method, options, **shared)` runs it: `options` holds the values of the method's own
    options, whose dataclass is `config(class)`; the annotations of the other parameters define the
    shared options. `panels` groups the shared options by title in `--help`, after the method's
    own; the last panel also holds `--help`.
    """

    name: str
    help: str
    kind: methods.Kind
    known: Callable[[], list[str]]
    config: Callable[[Any], type[Config]]
    run: Callable[..., None]
    panels: Mapping[str, tuple[str, ...]]

    def application(self) -> typer.Typer:
        """Return the typer application with a subcommand per method."""
        verb = self

        class MethodCommand(TyperCommand):
            """A method's subcommand, which reads its options, and imports torch, only when used."""

            def make_context(
                self, info_name: Any, args: Any, parent: Any = None, **extra: Any
            ) -> Any:
                assert self.name is not None
                return verb.command(self.name).make_context(info_name, args, parent, **extra)

        class MethodGroup(TyperGroup):
            def list_commands(self, ctx: Any) -> list[str]:
                return verb.known()

            def get_command(self, ctx: Any, cmd_name: str) -> Any:
                if cmd_name not in verb.known():
                    return None
                row = methods.METHODS[cmd_name]
                panel = "Methods" if row.status == "stable" else "Research"
                return MethodCommand(name=cmd_name, help=row.summary, rich_help_panel=panel)

            def resolve_command(self, ctx: Any, args: list[str]) -> Any:
                if args[0] not in verb.known() and not args[0].startswith("-"):
                    with session():
                        verb.refuse(args[0])
                return super().resolve_command(ctx, args)

        app = typer.Typer(
            cls=MethodGroup,
            help=f"{self.help}: spectool {self.name} METHOD MODEL OUT",
            no_args_is_help=True,
            subcommand_metavar="METHOD MODEL OUT",
        )
        # Without a callback typer would make a single subcommand the command itself.
        app.callback()(lambda: None)
        return app

    def refuse(self, name: str) -> None:
        """Raise the error for a word that is no method of this command.

        Raises:
            UsageError: always.
        """
        hint = None
        if Path(name).exists() or "/" in name:
            hint = f"give the method first: spectool {self.name} METHOD {name} OUT"
        try:
            methods.row(name, self.kind)
        except UsageError as error:
            raise UsageError(str(error), hint=hint or error.hint) from None
        raise UsageError(f"{name} is not for {self.name}; known: {', '.join(self.known())}")

    def command(self, name: str) -> Any:
        """Return the click command of one method, with the shared and the method's own options."""
        from spectool.options import options_of

        row = methods.METHODS[name]
        options = list(options_of(self.config(methods.resolve(name, row.kind))))

        def run(**values: Any) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            self.run(name, given, **values)

        shared = inspect.signature(self.run, eval_str=True).parameters
        parameters = [shared[key] for key in shared if key not in ("method", "options")]
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
        run.__doc__ = row.summary
        single = typer.Typer(add_completion=False)
        single.command(name, cls=self._command_class())(run)
        command: Any = typer.main.get_command(single)
        self._group(command.params)
        return command

    def _group(self, parameters: list[Any]) -> None:
        """Set the panels of the shared options and sort the parameters by panel."""
        panel_of = {name: panel for panel, names in self.panels.items() for name in names}
        for parameter in parameters:
            if parameter.name in panel_of:
                parameter.rich_help_panel = panel_of[parameter.name]
        # Arguments and the method's own options are in none of these panels, and stay in front.
        order = {name: index for index, name in enumerate(panel_of, start=1)}
        parameters.sort(key=lambda parameter: order.get(parameter.name, 0))

    def _command_class(self) -> type[TyperCommand]:
        last = list(self.panels)[-1]

        class Panelled(TyperCommand):
            def get_help_option(self, ctx: Any) -> Any:
                option: Any = super().get_help_option(ctx)
                if option is not None:
                    option.rich_help_panel = last
                return option

        return Panelled


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
    return text
