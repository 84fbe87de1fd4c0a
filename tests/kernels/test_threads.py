"""Who computes on how many threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spectool.kernels import build, products, threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def both() -> tuple[int, int]:
    return torch.get_num_threads(), threads.count()


def test_kernels_keep_their_threads_while_torch_has_one() -> None:
    assert both() == (3, 3)
    with threads.give_torch(several=False):
        assert both() == (1, 3)
        with threads.give_torch(several=True):
            assert both() == (3, 3)
        assert both() == (1, 3)
    assert both() == (3, 3)
    torch.set_num_threads(2)
    assert both() == (2, 2)


def test_torch_gets_its_threads_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), threads.give_torch(several=False):
        raise ZeroDivisionError
    assert both() == (3, 3)


@pytest.mark.skipif(build.missing() is not None, reason="no kernels here")
def test_the_self_test_of_products_runs_them_on_all_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()
    twin = products.twin

    def watch(*args: object) -> torch.Tensor:
        seen.add(both())
        return twin(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "twin", watch)
    products.check()
    assert seen == {(1, 3)}
