"""A dataclass's fields become flags, `key=value` pairs and metadata, and are validated."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, ClassVar, Literal

import pytest

from spectool import options
from spectool.errors import UsageError
from spectool.options import option, options_of, same_option


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(options.Config):
    bits: int = option(4, "width", minimum=2, maximum=8)
    rate: float = option(0.5, "learning rate", minimum=0)
    fast: bool = option(False, "no waiting")
    noise: Literal["normal", "uniform"] = option("normal", "of the noise")
    block: Literal[64, 128] = option(64, "size")
    limit: int | None = option(None, "no more than these")
    name_of_it: str = option("x", "called so")
    layers: tuple[int, ...] = option((), "some layers")
    skip: tuple[str, ...] = option((), "some names")

    def validate(self) -> None:
        if self.fast and self.bits > 4:
            raise UsageError("fast works up to 4 bits")


def test_an_option_of_another_class_is_that_option_under_the_panel_of_its_own() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Other(options.Config):
        PANEL: ClassVar = "Here"

        bits: int = same_option(Example, "bits")

    (bits,), theirs = options_of(Other), options_of(Example)[0]
    assert bits == replace(theirs, panel="Here") and theirs.panel is None
    with pytest.raises(UsageError, match="at most 8"):
        Other(bits=9)


def test_options_in_order_with_everything_a_surface_needs() -> None:
    found = {field.name: field for field in options_of(Example)}
    assert list(found) == [
        "bits",
        "rate",
        "fast",
        "noise",
        "block",
        "limit",
        "name_of_it",
        "layers",
        "skip",
    ]
    bits = found["bits"]
    assert (bits.type, bits.default, bits.help, bits.minimum, bits.maximum) == (
        int, 4, "width", 2, 8,
    )  # fmt: skip
    assert found["noise"].choices == ("normal", "uniform") and found["noise"].type is str
    assert found["block"].choices == (64, 128) and found["block"].type is int
    assert found["limit"].optional and found["limit"].type is int
    assert found["name_of_it"].flag == "--name-of-it"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("bits=3", {"bits": 3}),
        ("bits=3,fast=yes,rate=1e-3", {"bits": 3, "fast": True, "rate": 1e-3}),
        ("fast=0, noise=uniform ,block=128", {"fast": False, "noise": "uniform", "block": 128}),
        ("limit=none", {"limit": None}),
        ("layers=2-16-3", {"layers": (2, 16, 3)}),
        ("layers=", {"layers": ()}),
        ("limit=7,name-of-it=a b", {"limit": 7, "name_of_it": "a b"}),
    ],
)
def test_written_as_text(text: str, values: dict[str, Any]) -> None:
    assert Example.from_text(text) == Example(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits", "expected key=value"),
        ("bits=x", "bits=x: expected int"),
        ("bits=3.5", "expected int"),
        ("fast=perhaps", "expected true or false"),
        ("bots=3", "unknown option 'bots'; known: bits, rate"),
        ("bits=1", "--bits 1: must be at least 2"),
        ("bits=9", "must be at most 8"),
        ("noise=cauchy", "expected one of normal, uniform"),
        ("block=65", "expected one of 64, 128"),
        ("fast=true,bits=5", "fast works up to 4 bits"),
        ("bits=none", "expected int"),
        ("layers=2-x", "--layers 2-x: expected positive numbers, as 4 or 1,4,16"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Example.from_text(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [{"bits": "4"}, {"bits": True}, {"bits": 4.0}, {"fast": 1}, {"rate": "x"}, {"bits": None},
     {"noise": 3}, {"layers": ["1"]}, {"skip": [3]}],
)  # fmt: skip
def test_refused_values(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Example(**values)


def test_metadata_round_trip() -> None:
    config = Example(bits=3, rate=1, limit=5, layers=(2, 16), skip=("a", "b"))
    assert Example.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert config.as_dict()["layers"] == "2-16"
    with pytest.raises(UsageError, match="unknown option"):
        Example.from_dict({"bots": 3})


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Example().bits = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Example(5)  # type: ignore[misc]


def test_none_is_an_empty_list() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Texts(options.Config):
        text: tuple[str, ...] = option((), "texts")

    assert Texts(text=None).text == ()  # type: ignore[arg-type]
