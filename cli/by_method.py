"""Commands with one subcommand per method, whose options come from the method's dataclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from spectool import methods
from spectool.cli.common import session
from spectool.cli.derive import Command, configs_of, derive
from spectool.errors import UsageError
from spectool.options import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A command with one subcommand for each method of a kind.

    `run(output, method, config, ...)` runs it: `config` holds the method's own options, whose class
    is `config(method)`; the other parameters are `Config`s with the options of all methods.
    `others`: the bodies of methods that take other options.
    """

    name: str
    help: str
    kind: methods.Kind
    known: Callable[[], list[str]]
    config: Callable[[Any], type[Config]]
    run: Callable[..., None]
    others: Mapping[str, Callable[..., None]] = field(default_factory=dict)

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
            methods.get_method(name, self.kind)
        except UsageError as error:
            raise UsageError(str(error), hint=hint or error.hint) from None
        raise UsageError(f"{name} is not for {self.name}; known: {', '.join(self.known())}")

    def configs(self, name: str) -> dict[str, type[Config]]:
        """Return the classes of a method's options by the body's parameter that takes each."""
        own = self.config(methods.import_method(name, methods.METHODS[name].kind))
        return {**configs_of(self.others.get(name, self.run)), "config": own}

    def command(self, name: str) -> Any:
        """Return the click command of one method, with the method's own options first."""
        row = methods.METHODS[name]
        body = self.others.get(name, self.run)
        words, own = (self.name, name), f"Options of {name}"
        run = derive(body, self.configs(name), words=words, own=own, method=name)
        run.__doc__ = row.summary
        single = typer.Typer(add_completion=False)
        single.command(name, cls=Command)(run)
        command: Any = typer.main.get_command(single)
        return command
