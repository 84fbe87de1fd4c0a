"""A `Config` becomes the options of a command, and the words of a command line come from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from spectool.cli.common import Output
from spectool.cli.derive import Command, configs_of, derive
from spectool.options import Config, command_words, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Config):
    out: Path = option(..., "where to write", argument=True)
    overwrite: bool = option(False, "replace it", switch=True)
    checksums: bool = option(True, "do not check", switch=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything(Base):
    name: str = option(..., "required")
    bits: int = option(4, "width", minimum=2, maximum=8)
    rate: float | None = option(None, "learning rate", minimum=0)
    fast: bool = option(True, "no waiting")
    noise: Literal["normal", "uniform"] = option("normal", "of the noise")
    skip: tuple[str, ...] = option((), "repeatable")
    sizes: tuple[int, ...] = option((1,), "a list", minimum=1)
    plot: Path | None = option(None, "a file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Other(Config):
    other: int = option(0, "of another class")


def run(*words: str) -> tuple[Any, Any]:
    """Run a command with the options of both classes; return the result, and what the body got."""
    given: list[Any] = []

    def body(output: Output, one: Everything, two: Other) -> None:
        """Do it."""
        given[:] = one, two

    app = typer.Typer()
    app.command("body", cls=Command)(derive(body, configs_of(body), words=[]))
    return CliRunner().invoke(app, list(words)), tuple(given)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"overwrite": True, "checksums": False, "fast": False},
        {"bits": 3, "rate": 1e-5, "noise": "uniform", "sizes": (4, 1), "plot": Path("a.png")},
        {"skip": ("a b", "--x"), "name": "--y"},
    ],
)
def test_the_words_of_a_config_make_it_again(values: dict[str, Any]) -> None:
    config, other = Everything(**{"out": Path("o"), "name": "n", **values}), Other(other=3)
    words = command_words(other, config)
    assert words[0] == "o", "arguments first"
    done, given = run(*words)
    assert done.exit_code == 0, done.stderr
    assert given == (config, other)


def test_defaults_are_not_named() -> None:
    config = Everything(out=Path("o"), name="n", bits=4, sizes=(1,))
    assert command_words(Other(), config) == ["o", "--name", "n"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "9"], "error: --bits 9: must be at most 8"),
        (["--noise", "cauchy"], "error: --noise cauchy: expected one of normal, uniform"),
        (["--sizes", "1,x"], "error: --sizes 1,x: expected positive numbers"),
        (["--sizes", "0"], "error: --sizes 0: expected positive numbers"),
        (["--rate", "nan"], "error: --rate nan: must be finite"),
    ],
)
def test_a_value_outside_its_range_is_one_line(words: list[str], message: str) -> None:
    done, _ = run("o", "--name", "n", *words)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_required_option_and_a_switch_without_its_opposite() -> None:
    assert run("o")[0].exit_code == 2
    for flag in ("--no-overwrite", "--checksums"):
        assert "No such option" in run("o", "--name", "n", flag)[0].stderr
