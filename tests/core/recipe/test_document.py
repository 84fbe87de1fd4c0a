"""Recipes as files: every mistake is one line with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectool.errors import UsageError
from spectool.recipe.document import Recipe, read_recipe

STAGES = ["quantize", "eval"]


def read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(text)
    return read_recipe(tmp_path / "r.yaml", overrides, STAGES)


GOOD = """\
model: some/model
all: {threads: 2}
quantize:
  method: rtn
  group-size: 64
eval:
"""


def test_values_know_their_lines(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    (variant,) = recipe.variants()
    assert (variant.name, variant.model.value) == ("", "some/model")
    assert variant.every["threads"].value == 2
    given = variant.sections["quantize"]["group_size"]
    assert given.value == 64 and given.place.endswith("r.yaml, line 5")
    assert variant.sections["eval"] == {} and variant.places["eval"].endswith("line 6")


def test_overrides_win_and_may_add_a_stage(tmp_path: Path) -> None:
    overrides = ("quantize.group-size=32", "eval.gate=[a<=1, b<=2]", "model=other", "all.x=null")
    (variant,) = read(tmp_path, GOOD.replace("eval:\n", ""), *overrides).variants()
    given = variant.sections["quantize"]["group_size"]
    assert (given.value, given.place) == (32, "argument quantize.group-size=32")
    assert variant.sections["eval"]["gate"].value == ["a<=1", "b<=2"]
    assert variant.model.value == "other" and variant.every["x"].value is None


def test_a_matrix_is_every_combination(tmp_path: Path) -> None:
    matrix = "matrix:\n  quantize.bits: [2, 3]\n  model: [a/b, c]\n  eval.text: [[x, y]]\n"
    variants = read(tmp_path, GOOD + matrix).variants()
    assert [variant.name for variant in variants] == [
        f"bits={bits},model={model},text=x-y" for bits in (2, 3) for model in ("a_b", "c")
    ]
    assert [variant.sections["quantize"]["bits"].value for variant in variants] == [2, 2, 3, 3]
    assert [variant.model.value for variant in variants] == ["a/b", "c"] * 2
    assert variants[0].sections["quantize"]["group_size"].value == 64


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", (), "is empty"),
        ("[1, 2]", (), "expected keys with values"),
        ("model: [", (), "line 1: not YAML"),
        ("model: x\nquantize: {a: 1, a: 2}", (), "line 2: a: stands twice"),
        ("model: x\nquantise: {}", (), "line 2: quantise: no section"),
        ("model: x\nquantize: 4", (), "line 2: quantize: expected keys"),
        ("model: x\nquantize: {a: !!python/name:os.system 1}", (), "line 2: not plain YAML"),
        ("quantize: {}", (), "expected model: CHECKPOINT"),
        ("model: 3\nquantize: {}", (), "line 1: expected model: CHECKPOINT"),
        ("model: x\nall: {}", (), "holds no stage"),
        (GOOD, ("quantize.bits",), "expected section.option=value"),
        (GOOD, ("quantize=3",), "expected section.option=value"),
        (GOOD, ("quantise.bits=3",), "argument quantise.bits=3: quantise: no section"),
        (GOOD, ("quantize.bits=[",), "not a value in YAML"),
        (GOOD + "matrix: {bench.draft: [1]}", (), "matrix.bench.draft: expected an option"),
        (GOOD + "matrix: {quantize: [1]}", (), "matrix.quantize: expected an option"),
        (GOOD + "matrix: {quantize.bits: 3}", (), "matrix.quantize.bits: expected a list"),
        (GOOD + "matrix: {quantize.bits: [3, 3]}", (), "two variants are called bits=3"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text, *overrides).variants()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_near_name_is_suggested_and_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, "model: x\nquantise: {}")
    assert caught.value.hint == "did you mean quantize?"
    with pytest.raises(UsageError, match=r"gone\.yaml: cannot be read"):
        read_recipe(tmp_path / "gone.yaml", (), STAGES)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_recipe(tmp_path / "bytes.yaml", (), STAGES)
