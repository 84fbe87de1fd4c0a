"""In decoding the kernels alone run on several threads; what they do not compute, torch does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode import engine
from spectool.decode.generate import Runner
from spectool.kernels import registry, threads

from ...conftest import make_model

needs_kernel = pytest.mark.skipif(
    registry.choose("dense", "cpu", torch.float32).kernel is None, reason="no kernel here"
)
# Matrices that have a kernel.
LARGE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 256}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def watch(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, length: int, forward: str = "auto"
) -> tuple[list[Any], list[Any]]:
    """Decode three tokens; return the threads of torch and of kernels in passes, and after them."""
    passes: list[Any] = []
    verdicts: list[Any] = []
    resolve = engine.resolve_paths

    def see(seen: list[Any]) -> None:
        seen.append((torch.get_num_threads(), threads.count()))

    def resolve_paths(*args: Any) -> Any:
        see(verdicts)
        return resolve(*args)

    monkeypatch.setattr(engine, "resolve_paths", resolve_paths)
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: see(passes))
    Runner(model, forward=forward).generate([[1] * length], max_new_tokens=3)
    hook.remove()
    assert (torch.get_num_threads(), threads.count()) == (2, 2)
    return passes, verdicts


@needs_kernel
def test_torch_has_one_thread_where_kernels_compute_all_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama", **LARGE)
    passes, verdicts = watch(model, monkeypatch, 60)
    assert passes == [(1, 2)] * 3 and verdicts == [(2, 2), (1, 2), (1, 2)]


@needs_kernel
def test_torch_has_its_threads_in_passes_of_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes, _ = watch(make_model("llama", **LARGE), monkeypatch, 70, "modules")
    assert passes == [(2, 2), (1, 2), (1, 2)]


def test_torch_has_its_threads_where_a_large_product_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its blocks are no linears.
    large = {"n_embd": 256, "n_inner": 256, "vocab_size": 256}
    passes, verdicts = watch(make_model("gpt2", **large), monkeypatch, 20, "modules")
    assert passes == verdicts == [(2, 2)] * 3


@needs_kernel
def test_torch_has_one_thread_where_layers_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"n_embd": 256, "n_inner": 256, "vocab_size": 256}
    passes, _ = watch(make_model("gpt2", **large), monkeypatch, 70)
    assert passes == [(1, 2)] * 3
