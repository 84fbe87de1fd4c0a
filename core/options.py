"""Base of all options: a frozen dataclass whose fields carry type, default, range and help.

The command line, `:key=value` specifications, the metadata of artifacts, the command that makes an
artifact again and the reference page are all derived from such a `Config`. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from spectool.errors import UsageError


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    argument: bool = False,
    switch: bool = False,
    written: bool = False,
    short: str | None = None,
) -> Any:
    """Return a field of a `Config` with its default, its help line and the range of a number.

    A default of `...` means that a value is required. Numbers are finite, unless `maximum` is inf.
    `argument`: given by its position on the command line. `switch`: a bool with a single flag,
    which turns the default around; other bools have two flags, `--name` and `--no-name`. `written`:
    names a file or directory that the command writes; others that are there are read. `short`: a
    second flag of one letter, as `-o`.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "argument": argument,
        "switch": switch,
        "written": written,
        "short": short,
    }
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def same_option(config: type[Config], name: str) -> Any:
    """Return an option of a class, for another class that does not derive from it."""
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A field of a `Config`, resolved.

    `type`: of a value, or with `many` of a tuple's members. `choices` is empty if any value of the
    type is allowed. `default` is `...` if a value is required.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[Any, ...]
    optional: bool
    many: bool
    minimum: float | None
    maximum: float | None
    argument: bool
    switch: bool
    written: bool
    short: str | None
    panel: str | None

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        off = "no-" if self.switch and self.default else ""
        return f"--{off}{self.name.replace('_', '-')}"

    @property
    def repeats(self) -> bool:
        """Whether the flag is repeated for several values; numbers are listed in one word."""
        return self.many and self.type is str

    def parse(self, text: str) -> Any:
        """Parse a value of this option; a list of numbers is written 1-4-16 or 1,4,16.

        Raises:
            UsageError: `text` is not a value of the option's type.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.repeats:
            return (text,)
        if self.many:
            parts = [part.strip() for part in text.replace("-", ",").split(",") if text]
            if not all(part.isdecimal() and int(part) >= (self.minimum or 0) for part in parts):
                raise UsageError(f"{self.flag} {text}: expected positive numbers, as 4 or 1,4,16")
            return tuple(map(int, parts))
        if self.type is bool:
            known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if text.lower() in known:
                return known[text.lower()]
            raise UsageError(f"{self.name}={text}: expected true or false")
        try:
            return self.type(text)
        except ValueError as error:
            raise UsageError(f"{self.name}={text}: expected {self.type.__name__}") from error

    def format(self, value: Any) -> str:
        """Return the text that `parse` makes `value` of."""
        return "-".join(map(str, value)) if self.many else str(value)

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that set the option to `value`."""
        if self.argument:
            return list(value) if self.repeats else [str(value)]
        if self.type is bool:
            return [self.flag if value or self.switch else self.flag.replace("--", "--no-", 1)]
        given = value if self.repeats else [self.format(value)]
        return [word for each in given for word in (self.flag, each)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Base of all options. Subclasses are dataclasses with the same three flags.

    `PANEL` is the title in `--help` of the options that a class adds to those of its base. A list
    of numbers may be given as text, as artifacts store it. Fields not made by `option` are no
    options.

    Raises:
        UsageError: a value of the wrong type, outside its range or not among its choices.
    """

    PANEL: ClassVar[str | None] = None

    # Subclasses override `validate`: in a `__post_init__` of a slotted dataclass `super()` fails,
    # since the decorator makes a new class.
    def __post_init__(self) -> None:
        for field in options_of(type(self)):
            value = getattr(self, field.name)
            if field.many and not isinstance(value, tuple):
                value = field.parse(value) if isinstance(value, str) else tuple(value or ())
                object.__setattr__(self, field.name, value)
            for each in value if field.many else [value]:
                _check(field, each)
        self.validate()

    def validate(self) -> None:
        """Check what involves more than one field."""

    def as_dict(self) -> dict[str, Any]:
        """Return the options by name, as artifacts store them in JSON."""
        values = {field: getattr(self, field.name) for field in options_of(type(self))}
        return {
            field.name: field.format(value) if field.many and not field.repeats else value
            for field, value in values.items()
        }

    def changed(self) -> dict[Option, Any]:
        """Return the options that differ from their defaults, with their values."""
        values = {field: getattr(self, field.name) for field in options_of(type(self))}
        return {
            field: value
            for field, value in values.items()
            if value != field.default and value is not None
        }

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
        """Parse `key=value,key=value` (empty: all defaults)."""
        fields = {field.name: field for field in options_of(cls)}
        values: dict[str, Any] = {}
        for pair in filter(None, pairs.split(",")):
            name, equals, text = pair.partition("=")
            name = name.strip().replace("-", "_")
            if not equals:
                raise UsageError(f"{pair!r}: expected key=value")
            values[name] = fields[name].parse(text.strip()) if name in fields else text
        return cls.from_dict(values)


def command_words(*configs: Config) -> list[str]:
    """Return the words of a command line that set the options of `configs`, without the defaults.

    Arguments come first.
    """
    given = [item for config in configs for item in config.changed().items()]
    given.sort(key=lambda item: not item[0].argument)
    return [word for field, value in given for word in field.words(value)]


# By class: resolving type hints takes a while, and options are made for each request.
_RESOLVED: dict[type[Config], tuple[Option, ...]] = {}


def options_of(config: type[Config]) -> tuple[Option, ...]:
    """Return the options of a `Config` class in the order of its fields."""
    if config not in _RESOLVED:
        hints = typing.get_type_hints(config)
        _RESOLVED[config] = tuple(
            _resolve(config, field, hints[field.name])
            for field in dataclasses.fields(config)
            if "help" in field.metadata
        )
    return _RESOLVED[config]


def _resolve(config: type[Config], field: dataclasses.Field[Any], hint: Any) -> Option:
    """Resolve a field by its type hint: a type, one or None, a `Literal`, or a tuple of a type."""
    optional, many, choices = False, False, tuple[Any, ...]()
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        assert len(members) == 1, f"{config.__name__}.{field.name}: one type, or one and None"
        hint, optional = members[0], True
    if typing.get_origin(hint) is tuple:
        hint, many = typing.get_args(hint)[0], True
        assert hint in (int, str), f"{config.__name__}.{field.name}: a tuple of {hint}"
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    assert hint in (bool, int, float, str, Path), f"{config.__name__}.{field.name}: {hint}"
    owner = next(c for c in config.__mro__ if field.name in vars(c).get("__annotations__", ()))
    default = ... if field.default is dataclasses.MISSING else field.default
    return Option(
        name=field.name,
        type=hint,
        default=default,
        choices=choices,
        optional=optional,
        many=many,
        panel=vars(owner).get("PANEL"),
        **field.metadata,
    )


def _check(field: Option, value: Any) -> None:
    """Check type, choices and range of one value."""
    if value is None and field.optional:
        return
    wanted: Any = (int, float) if field.type is float else field.type
    if not isinstance(value, wanted) or (isinstance(value, bool) and field.type is not bool):
        raise UsageError(f"{field.flag} {value!r}: expected {field.type.__name__}")
    if isinstance(value, float) and not math.isfinite(value) and value != field.maximum:
        raise UsageError(f"{field.flag} {value}: must be finite")
    if field.choices and value not in field.choices:
        listed = ", ".join(str(choice) for choice in field.choices)
        expected = f"one of {listed}" if len(field.choices) > 1 else listed
        raise UsageError(f"{field.flag} {value}: expected {expected}")
    if field.minimum is not None and value < field.minimum:
        raise UsageError(f"{field.flag} {value}: must be at least {field.minimum}")
    if field.maximum is not None and value > field.maximum:
        raise UsageError(f"{field.flag} {value}: must be at most {field.maximum}")
