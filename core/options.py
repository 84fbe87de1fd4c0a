"""Base of the methods' options: a frozen dataclass whose fields carry type, default and help.

The command line, `:key=value` specifications, the artifact's metadata and the reference pages are
all derived from such a `Config`. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from spectool.errors import UsageError


def option(
    default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None
) -> Any:
    """Return a field of a `Config` with its default, its help line and the range of a number."""
    bounds = {"help": help, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A field of a `Config`, resolved. `choices` is empty if any value of the type is allowed."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[Any, ...]
    optional: bool
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """Parse a value of this option.

        Raises:
            UsageError: `text` is not a value of the option's type.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.type is bool:
            known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if text.lower() in known:
                return known[text.lower()]
            raise UsageError(f"{self.name}={text}: expected true or false")
        try:
            return self.type(text)
        except ValueError as error:
            raise UsageError(f"{self.name}={text}: expected {self.type.__name__}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Base of every method's options. Subclasses are dataclasses with the same three flags.

    Raises:
        UsageError: a value of the wrong type, outside its range or not among its choices.
    """

    # Subclasses override `validate`: in a `__post_init__` of a slotted dataclass `super()` fails,
    # since the decorator makes a new class.
    def __post_init__(self) -> None:
        for field in options_of(type(self)):
            _check(field, getattr(self, field.name))
        self.validate()

    def validate(self) -> None:
        """Check what involves more than one field."""

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, as artifacts store them in JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config of values by name.

        Raises:
            UsageError: an unknown name, or an invalid value.
        """
        known = [field.name for field in options_of(cls)]
        for name in values:
            if name not in known:
                raise UsageError(
                    f"unknown option {name!r}; known: {', '.join(known) or 'none at all'}"
                )
        return cls(**values)

    @classmethod
    def from_text(cls, pairs: str) -> Self:
        """Parse `key=value,key=value` (empty: all defaults).

        Raises:
            UsageError: see `from_dict`.
        """
        fields = {field.name: field for field in options_of(cls)}
        values: dict[str, Any] = {}
        for pair in filter(None, pairs.split(",")):
            name, equals, text = pair.partition("=")
            name = name.strip().replace("-", "_")
            if not equals:
                raise UsageError(f"{pair!r}: expected key=value")
            values[name] = fields[name].parse(text.strip()) if name in fields else text
        return cls.from_dict(values)


def options_of(config: type[Config]) -> Iterator[Option]:
    """Yield the options of a `Config` class in the order of its fields."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint: Any = hints[field.name]
        optional, choices = False, tuple[Any, ...]()
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            members = [arm for arm in typing.get_args(hint) if arm is not type(None)]
            assert len(members) == 1, f"{config.__name__}.{field.name}: one type, or one and None"
            hint, optional = members[0], True
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            hint = type(choices[0])
        assert hint in (bool, int, float, str), f"{config.__name__}.{field.name}: {hint}"
        yield Option(
            name=field.name,
            type=hint,
            default=field.default,
            help=field.metadata["help"],
            choices=choices,
            optional=optional,
            minimum=field.metadata["minimum"],
            maximum=field.metadata["maximum"],
        )


def _check(field: Option, value: Any) -> None:
    """Check type, choices and range of one value.

    Raises:
        UsageError: see `Config`.
    """
    if value is None and field.optional:
        return
    wanted: Any = (int, float) if field.type is float else field.type
    if not isinstance(value, wanted) or (isinstance(value, bool) and field.type is not bool):
        raise UsageError(f"{field.flag} {value!r}: expected {field.type.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{field.flag} {value}: must be finite")
    if field.choices and value not in field.choices:
        listed = ", ".join(str(choice) for choice in field.choices)
        raise UsageError(f"{field.flag} {value}: expected one of {listed}")
    if field.minimum is not None and value < field.minimum:
        raise UsageError(f"{field.flag} {value}: must be at least {field.minimum}")
    if field.maximum is not None and value > field.maximum:
        raise UsageError(f"{field.flag} {value}: must be at most {field.maximum}")
