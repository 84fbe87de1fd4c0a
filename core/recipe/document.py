"""Recipes as files: sections of options, each value with the place where it was written.

    model: examples/tiny-python
    quantize: {method: gptq, bits: 3}
    eval: {text: held-out.txt, gate: perplexity_ratio<=1.1}
    matrix:
      quantize.bits: [2, 3, 4]

`model` is the checkpoint that the stages start from; `all` has options of every stage that knows
them; `matrix` has lists of values, each of which makes a variant. What a section may hold is known
to `plan`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spectool.errors import UsageError, nearest

ALL, MATRIX, MODEL = "all", "matrix", "model"


@dataclass(frozen=True, slots=True)
class Given:
    """A value of a recipe, and where it was given, for errors."""

    value: Any
    place: str


Section = Mapping[str, Given]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A recipe with one value of each axis of its matrix; `name` is empty without a matrix.

    `places`: where each section begins.
    """

    name: str
    values: Mapping[str, Any]
    model: Given
    every: Section
    sections: Mapping[str, Section]
    places: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe with its overrides."""

    model: Given
    sections: dict[str, dict[str, Given]]
    places: dict[str, str] = field(default_factory=dict)

    def variants(self) -> list[Variant]:
        """Return the recipe once for each combination of the matrix's values, in their order.

        Raises:
            UsageError: an axis is no list of values, or names no section.
        """
        sections = dict(self.sections)
        axes = sections.pop(MATRIX, {})
        every = sections.pop(ALL, {})
        for name, given in axes.items():
            stage, dot, _ = name.partition(".")
            if name != MODEL and (not dot or stage not in sections):
                raise UsageError(
                    f"{given.place}: {MATRIX}.{name}: expected an option of a stage of this recipe",
                    hint=nearest(stage, sections) or "write it as quantize.bits: [2, 3, 4]",
                )
            if not isinstance(given.value, list) or not given.value:
                raise UsageError(f"{given.place}: {MATRIX}.{name}: expected a list of values")
        found = []
        for combination in itertools.product(*(given.value for given in axes.values())):
            values = dict(zip(axes, combination, strict=True))
            changed = {stage: dict(section) for stage, section in sections.items()}
            model = self.model
            for name, value in values.items():
                stage, _, option = name.partition(".")
                if name == MODEL:
                    model = Given(value, axes[name].place)
                else:
                    changed[stage][_option_name(option)] = Given(value, axes[name].place)
            found.append(
                Variant(
                    name=_variant_name(values),
                    values=values,
                    model=model,
                    every=every,
                    sections=changed,
                    places=self.places,
                )
            )
        names = [variant.name for variant in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"{self.places[MATRIX]}: {MATRIX}: two variants are called {twice}")
        return found


def _variant_name(values: Mapping[str, Any]) -> str:
    """Name a variant, and its folder, by its values: `bits=3,method=rtn`."""
    options = [name.partition(".")[2] or name for name in values]
    parts = []
    for (name, value), option in zip(values.items(), options, strict=True):
        shown = name if options.count(option) > 1 else option
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{shown}={''.join(c if c.isalnum() or c in '._+-' else '_' for c in text)}")
    return ",".join(parts)


def read_recipe(path: Path, overrides: Sequence[str], stages: Collection[str]) -> Recipe:
    """Read a recipe of these stages, with overrides written `section.option=value`, in YAML.

    Raises:
        UsageError: the file is absent or no YAML, a key stands twice, a section is unknown, or an
            override has another form.
    """
    known = [MODEL, ALL, *stages, MATRIX]
    sections: dict[str, dict[str, Given]] = {}
    places: dict[str, str] = {}
    model: Given | None = None
    for name, place, node in _pairs(_compose(path), path, str(path)):
        if name not in known:
            raise UsageError(
                f"{place}: {name}: no section of a recipe; known: {', '.join(known)}",
                hint=nearest(name, known),
            )
        places[name] = place
        if name == MODEL:
            model = Given(_construct(node, place), place)
            continue
        sections[name] = {
            _option_name(key) if name != MATRIX else key: Given(_construct(value, where), where)
            for key, where, value in _pairs(node, path, f"{place}: {name}")
        }
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, option = key.partition(".")
        place = f"argument {text}"
        if not equals or (key != MODEL and not (dot and option)):
            raise UsageError(f"{place}: expected section.option=value, as quantize.bits=3")
        if section not in known:
            raise UsageError(
                f"{place}: {section}: no section of a recipe", hint=nearest(section, known)
            )
        try:
            given = Given(yaml.safe_load(value), place)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"{place}: not a value in YAML: {_reason(error)}") from error
        if key == MODEL:
            model = given
        else:
            places.setdefault(section, place)
            option = _option_name(option) if section != MATRIX else option
            sections.setdefault(section, {})[option] = given
    if model is None or not isinstance(model.value, str):
        raise UsageError(
            f"{path if model is None else model.place}: expected model: CHECKPOINT, a directory "
            "or a hub id"
        )
    if not any(name in sections for name in stages):
        raise UsageError(f"{path}: holds no stage; known: {', '.join(stages)}")
    return Recipe(model=model, sections=sections, places=places)


def _option_name(key: str) -> str:
    return key.replace("-", "_")


def _compose(path: Path) -> yaml.Node:
    """Read a YAML file as nodes, which know their lines."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = path if line is None else f"{path}, line {line + 1}"
        raise UsageError(f"{where}: not YAML: {_reason(error)}") from error
    if node is None:
        raise UsageError(f"{path}: is empty; expected a recipe")
    return node


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _pairs(node: yaml.Node, path: Path, what: str) -> Iterator[tuple[str, str, yaml.Node]]:
    """Yield the keys of a mapping with their places and values; `key:` alone is an empty one.

    Raises UsageError where it is none, or a key stands twice.
    """
    if isinstance(node, yaml.ScalarNode) and _construct(node, what) is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{what}: expected keys with values")
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping as a key"
        if name in seen:
            raise UsageError(f"{place}: {name}: stands twice")
        seen.add(name)
        yield name, place, value


def _construct(node: yaml.Node, place: str) -> Any:
    """Return the value of a node."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{place}: not plain YAML: {_reason(error)}") from error
    finally:
        loader.dispose()
