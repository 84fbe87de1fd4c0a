"""Plans of recipes: the stages of each variant, with all options checked, before any of them runs.

A stage is one command. What it takes from earlier ones stands as a placeholder in its options:
`{distill}`, `{quantize}` and `{train-heads}` are the directories that these stages write, `{run}`
is the run's folder, and `{model}` the recipe's checkpoint. Where a recipe does not say otherwise, a
stage takes the newest checkpoint. Stages of several variants with the same options are one stage.

The classes of a stage's options come from its command (`Command`): no option is defined here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectool import methods
from spectool.checkpoint.hub import is_local
from spectool.errors import UsageError, nearest
from spectool.options import Config, Option, command_words, options_of
from spectool.recipe.document import ALL, Given, Recipe, Variant

# The stages in the order in which they run, with the directory that each writes.
STAGES: dict[str, str | None] = {
    "distill": "distilled",
    "quantize": "packed",
    "train-heads": "heads",
    "tune": None,
    "eval": None,
    "bench": None,
    "report": None,
}
# Not one of a variant: it shows the results of all.
REPORT = "report"
CHECKPOINTS = ("distill", "quantize")

# Set by the run.
_RESERVED = ("out", "overwrite", "dry_run")

_PLACEHOLDER = re.compile(r"\{([a-z-]+)\}")

# Endings of files that are read: a value with one of them names a file that must be there.
_ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".gz", ".xz", ".yaml", ".yml", ".safetensors")

Classes = Sequence[type[Config]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A stage's command: the methods that it may take, none for most, and its options.

    `shared` returns the classes of the options that need no torch; `classes` all of them, in the
    order of the command's arguments. Both take the method.
    """

    methods: Sequence[str] = ()
    shared: Callable[[str | None], Classes]
    classes: Callable[[str | None], Classes]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A command of a recipe. `home`: the name of the variant in whose folder it writes.

    `configs` have placeholders, for `takes`: the stages whose output this one reads.
    """

    stage: str
    method: str | None
    configs: tuple[Config, ...]
    home: str
    takes: tuple[PlannedStage, ...]

    @property
    def result(self) -> str:
        """The name of the file with the result."""
        return f"{list(STAGES).index(self.stage) + 1:02}-{self.stage}.json"

    @property
    def identity(self) -> str:
        """A digest of all options, with those of the stages before: of equal stages the same."""
        options = [config.as_dict() for config in self.configs]
        record = [self.stage, self.method, options, [planned.identity for planned in self.takes]]
        return hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()

    @property
    def is_timed(self) -> bool:
        """Whether the result depends on the machine: texts are decoded, with a clock beside."""
        return any(getattr(config, "prompts", None) is not None for config in self.configs)

    def filled(self, names: Mapping[str, str]) -> tuple[Config, ...]:
        """Return the options with the placeholders replaced by these names."""
        return tuple(_fill(config, names) for config in self.configs)

    def words(self, names: Mapping[str, str]) -> list[str]:
        """Return the words of the command line, after `spectool`."""
        method = [] if self.method is None else [self.method]
        return [self.stage, *method, *command_words(*self.filled(names))]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantPlan:
    """The stages of a variant, in order."""

    variant: Variant
    stages: tuple[PlannedStage, ...]

    @property
    def model(self) -> str:
        """The checkpoint that the stages start from."""
        return str(self.variant.model.value)


def make_plan(recipe: Recipe, commands: Mapping[str, Command]) -> list[VariantPlan]:
    """Return the stages of all variants.

    What needs no torch is checked first, in all stages.

    Raises:
        UsageError: an option or a method is unknown or has no such value, one is missing, or a file
            that is read is absent.
    """
    variants = recipe.variants()
    for variant in variants:
        _check_model(variant.model)
        for stage in _stages(variant):
            command = commands[stage]
            method = _method_of(variant, stage, command)
            _make_configs(variant, stage, method, command.shared(method), rest=method is not None)
    plans, known = [], dict[str, PlannedStage]()
    for variant in variants:
        stages: dict[str, PlannedStage] = {}
        for stage in _stages(variant):
            method = _method_of(variant, stage, commands[stage])
            configs = _make_configs(variant, stage, method, commands[stage].classes(method))
            planned = PlannedStage(
                stage=stage,
                method=method,
                configs=configs,
                home=variant.name,
                takes=_find_takes(configs, stages),
            )
            stages[stage] = known.setdefault(planned.identity, planned)
        _check_every(variant, list(stages.values()))
        plans.append(VariantPlan(variant=variant, stages=tuple(stages.values())))
    return plans


def plan_report(recipe: Recipe, commands: Mapping[str, Command]) -> PlannedStage | None:
    """Return the stage that shows the results of all variants on a page; None without one.

    Raises:
        UsageError: an option is unknown or has no such value.
    """
    if REPORT not in recipe.sections:
        return None
    classes = commands[REPORT].classes(None)
    configs = _make_configs(recipe.variants()[0], REPORT, None, classes)
    return PlannedStage(stage=REPORT, method=None, configs=configs, home="", takes=())


def _stages(variant: Variant) -> list[str]:
    return [stage for stage in STAGES if stage in variant.sections and stage != REPORT]


def _check_model(model: Given) -> None:
    """Raise UsageError if the model is a path that is not there."""
    if is_local(str(model.value)) and not Path(str(model.value)).exists():
        raise UsageError(f"{model.place}: model: {model.value}: no such directory")


def _method_of(variant: Variant, stage: str, command: Command) -> str | None:
    """Return the method of a stage; raises UsageError where it is missing or unknown."""
    given = variant.sections[stage].get("method")
    if not command.methods:
        return None
    if given is None:
        raise UsageError(
            f"{variant.places[stage]}: {stage}: expected method: {', '.join(command.methods)}"
        )
    if given.value not in command.methods:
        known = ", ".join(command.methods)
        raise UsageError(
            f"{given.place}: {stage}.method: {given.value}: expected one of {known}",
            hint=nearest(str(given.value), command.methods),
        )
    return str(given.value)


def _make_configs(
    variant: Variant, stage: str, method: str | None, classes: Classes, *, rest: bool = False
) -> tuple[Config, ...]:
    """Make a stage's options of what the recipe gives; with `rest` unknown ones are left out.

    Raises UsageError, with the place, where it gives something else than an option, or no value of
    one that is required.
    """
    section = variant.sections[stage]
    options = {option.name: option for config in classes for option in options_of(config)}
    for name, given in section.items():
        if name in _RESERVED:
            raise UsageError(f"{given.place}: {stage}.{name}: set by the run; leave it out")
        if name == "method" and method is not None:
            continue
        if name not in options and not rest:
            raise UsageError(
                f"{given.place}: {stage}.{name}: no option of {stage}", hint=nearest(name, options)
            )
    bound = _bound(variant, stage)
    found: dict[str, Given] = {}
    for name, option in options.items():
        if name in section:
            found[name] = section[name]
        elif name in variant.every and not option.argument:
            found[name] = variant.every[name]
        elif name in bound:
            found[name] = Given(bound[name], variant.places[stage])
        elif option.default is ...:
            raise UsageError(f"{variant.places[stage]}: {stage}: expected {name}: {option.help}")
    values = {name: _convert(options[name], given, variant, stage) for name, given in found.items()}
    return tuple(_build(config, values, found, variant.places[stage], stage) for config in classes)


def _bound(variant: Variant, stage: str) -> dict[str, Any]:
    """Return what a stage takes where the recipe does not say otherwise."""
    if stage == REPORT:
        return {"runs": ["{run}"], "out": "{run}/report.html"}
    before = [name for name in _stages(variant) if list(STAGES).index(name) < _rank(stage)]
    made = [name for name in before if name in CHECKPOINTS]
    bound: dict[str, Any] = {
        "model": f"{{{made[-1]}}}" if made else "{model}",
        "out": f"{{run}}/{STAGES[stage]}",
        "overwrite": True,
    }
    if "train-heads" in before:
        bound["heads"] = "{train-heads}"
        method = str(variant.sections["train-heads"]["method"].value)
        # Acceptance and judge heads belong to a draft model, which the recipe has to name.
        if method in methods.list_trainable() and "prompts" in variant.sections[stage]:
            bound["draft"] = ["{train-heads}"]
    if stage == "eval" and made:
        bound["reference"] = "{model}"
    return bound


def _rank(stage: str) -> int:
    return list(STAGES).index(stage)


def _convert(option: Option, given: Given, variant: Variant, stage: str) -> Any:
    """Return a value of YAML as the option has it, with `{model}` replaced."""
    place, value = f"{given.place}: {stage}.{option.name}", given.value
    if option.many and not isinstance(value, list):
        value = [] if value is None else [value]
    parts = value if option.many else [value]
    if any(isinstance(each, (dict, list)) for each in parts):
        raise UsageError(
            f"{place}: expected {'a list of values' if option.many else 'one value'}",
            hint='a placeholder stands in quotes: "{quantize}"',
        )

    def convert(each: Any) -> Any:
        if not isinstance(each, str):
            return each
        text = each.replace("{model}", str(variant.model.value))
        for name in _PLACEHOLDER.findall(text):
            _check_placeholder(name, variant, stage, place)
        is_file = text.endswith(_ENDINGS) and not re.search(r"[:{]", text)
        if is_file and not option.written and not Path(text).exists():
            raise UsageError(f"{place}: {text}: no such file")
        if option.type is str:
            return text
        try:
            return option.parse(text)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from None

    converted = [convert(each) for each in parts]
    if not option.many:
        return converted[0]
    # A list in one word, as 1,4,16, is one too.
    lists = [each if isinstance(each, tuple) else (each,) for each in converted]
    return tuple(each for one in lists for each in one)


def _check_placeholder(name: str, variant: Variant, stage: str, place: str) -> None:
    """Raise UsageError unless a placeholder names the run, or an earlier stage that writes."""
    before = [each for each in _stages(variant) if _rank(each) < _rank(stage) and STAGES[each]]
    if name not in ("run", *before):
        known = ", ".join(f"{{{each}}}" for each in ("model", "run", *before))
        raise UsageError(f"{place}: {{{name}}} stands for nothing here; known: {known}")


def _build(
    config: type[Config],
    values: Mapping[str, Any],
    given: Mapping[str, Given],
    place: str,
    stage: str,
) -> Config:
    """Make the options of one class; an error names the place of the option that it is about."""
    names = [option.name for option in options_of(config)]
    try:
        return config(**{name: values[name] for name in names if name in values})
    except UsageError as error:
        for option in options_of(config):
            if option.name in given and re.search(rf"{option.flag}\b(?!-)", str(error)):
                where = given[option.name].place
                raise UsageError(f"{where}: {stage}: {error}", hint=error.hint) from None
        raise UsageError(f"{place}: {stage}: {error}", hint=error.hint) from None


def _find_takes(
    configs: Sequence[Config], before: Mapping[str, PlannedStage]
) -> tuple[PlannedStage, ...]:
    """Return the stages that a stage's placeholders name, and the tuning of heads that it runs."""
    named = {
        name
        for config in configs
        for text in texts_of(config).values()
        for name in _PLACEHOLDER.findall(text)
    }
    if "train-heads" in named and "tune" in before:
        named.add("tune")
    return tuple(planned for stage, planned in before.items() if stage in named)


def texts_of(config: Config, *, written: bool = False) -> dict[str, str]:
    """Return the strings and paths of a config by name, numbered where there are several.

    Those that name what the command writes are left out, or with `written` all others; the stage's
    directory is none of both.
    """
    found: dict[str, str] = {}
    for option in options_of(type(config)):
        if option.written != written or option.name == "out":
            continue
        value = getattr(config, option.name)
        if isinstance(value, (str, Path)):
            found[option.name] = str(value)
        elif option.repeats:
            found |= {f"{option.name}.{index}": each for index, each in enumerate(value)}
    return found


def _check_every(variant: Variant, stages: Sequence[PlannedStage]) -> None:
    """Raise UsageError if no stage has an option that all shall have."""
    known = {
        option.name
        for planned in stages
        for config in planned.configs
        for option in options_of(type(config))
        if not option.argument
    }
    for name, given in variant.every.items():
        if name not in known:
            raise UsageError(
                f"{given.place}: {ALL}.{name}: no option of a stage", hint=nearest(name, known)
            )


def _fill(config: Config, names: Mapping[str, str]) -> Config:
    """Return a config with the placeholders in its strings and paths replaced."""

    def fill(text: str) -> str:
        return _PLACEHOLDER.sub(lambda found: names[found[1]], text)

    changed: dict[str, Any] = {}
    for option in options_of(type(config)):
        value = getattr(config, option.name)
        if isinstance(value, (str, Path)):
            changed[option.name] = type(value)(fill(str(value)))
        elif option.repeats:
            changed[option.name] = tuple(map(fill, value))
    return replace(config, **changed)
