"""Every row of the methods table resolves, has a summary and a test."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

from spectool import options
from spectool.errors import UsageError
from spectool.methods import METHODS, get_method, import_method, list_methods
from spectool.model.packed import PackedLinear
from spectool.options import options_of
from spectool.quantize.base import Quantizer, parse_quantizer

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("name", METHODS)
def test_row_resolves_and_explains_itself(name: str) -> None:
    method = METHODS[name]
    target = import_method(name, method.kind)
    assert callable(target)
    assert 10 < len(method.summary) < 100 and not method.summary.endswith(".")
    assert method.source and method.runs_in and method.status in ("stable", "research")
    module = method.target.partition(":")[0]
    assert inspect.getdoc(__import__(module, fromlist=["x"]))


@pytest.mark.parametrize(
    "name", [name for name, m in METHODS.items() if m.kind not in ("verifier", "measure")]
)
def test_options_have_help_and_are_frozen(name: str) -> None:
    config = import_method(name, METHODS[name].kind).Config
    assert issubclass(config, options.Config) and dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    config()
    for field in options_of(config):
        assert field.help and len(field.help) < 90 and not field.help.endswith(".")


@pytest.mark.parametrize("name", list_methods("quantizer"))
def test_quantizer_keeps_its_contract(name: str) -> None:
    quantizer: Quantizer = import_method(name, "quantizer")()
    assert quantizer.name == name
    assert quantizer == parse_quantizer(name) and str(quantizer) == name
    for shape in ((42, 123), (1, 1), (64, 256)):
        spec = quantizer.layout(shape)
        with torch.device("meta"):
            module = quantizer.build(shape)
        assert isinstance(module, PackedLinear)
        found = {key: (t.dtype, tuple(t.shape)) for key, t in module.q.named_buffers()}
        assert found == spec
        assert all(tensor.is_meta for tensor in module.q.buffers())
        assert not list(module.parameters())
    assert (TESTS / "quantize" / f"test_{name.replace('-', '_')}.py").exists()


def test_wrong_name_or_kind() -> None:
    with pytest.raises(UsageError, match="no quantizer is called 'rtm'; known: rtn") as caught:
        get_method("rtm", "quantizer")
    assert caught.value.hint == "did you mean rtn?"
    with pytest.raises(UsageError, match="no drafter is called 'rtn'"):
        import_method("rtn", "drafter")
