from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectool.errors import TextError
from spectool.evaluate.audit.items import read_suite
from spectool.evaluate.audit.trust import KNOWN

CHOICE = {"id": "a", "dimension": "d", "task": "choice", "prompt": "p", "options": [" x", " y"]}
RIGHT: dict[str, Any] = {**CHOICE, "gold": 0}
REPLY: dict[str, Any] = {"id": "b", "dimension": "e", "task": "generate", "prompt": "p"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**RIGHT, "colour": "red"}, "unknown field 'colour'"),
        ({**RIGHT, "id": ""}, "has no id"),
        ({**RIGHT, "id": 3}, "id is no text"),
        ({**RIGHT, "task": "pair"}, "expected choice or generate"),
        ({**RIGHT, "messages": []}, "either prompt or messages"),
        ({**RIGHT, "options": [" x", " x"]}, "different texts"),
        ({**RIGHT, "options": [" x"]}, "two options"),
        (CHOICE, "gold None"),
        ({**RIGHT, "gold": 2}, "gold 2"),
        ({**RIGHT, "gold": True}, "gold True"),
        ({**RIGHT, "secret": "s"}, "secret is for"),
        ({**REPLY, "gold": 0}, "gold without options"),
        ({**REPLY, "secret": "--"}, "no letter or digit"),
        ({**REPLY, "group": "g"}, "group is for"),
        ({**REPLY, "prompt": ""}, "needs a prompt"),
        ({**REPLY, "perturbation_of": "z"}, "no such item"),
        ({**REPLY, "id": "first"}, "is that of"),
    ],
)
def test_a_wrong_item_is_named_by_its_line(
    write_suite: Callable[..., Path], wrong: dict[str, Any], message: str
) -> None:
    path = write_suite([{**RIGHT, "id": "first", "dimension": "other"}, wrong])
    with pytest.raises(TextError, match=message) as error:
        read_suite([str(path)])
    assert str(error.value).startswith(f"{path}:2:")


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    for line in ("{", "[1]"):
        (tmp_path / "s.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(TextError, match=r"s\.jsonl:2:"):
            read_suite([str(tmp_path)])


def test_groups_and_variations_must_fit_together(write_suite: Callable[..., Path]) -> None:
    circle = [{**RIGHT, "perturbation_of": "c"}, {**RIGHT, "id": "c", "perturbation_of": "a"}]
    half = [{**RIGHT, "group": "g"}, {**RIGHT, "id": "c"}]
    lonely = [{**RIGHT, "group": "g"}, {**RIGHT, "id": "c", "group": "g"}]
    for items, message in ((circle, "leads back"), (half, "dimension d"), (lonely, "dimension d")):
        with pytest.raises(TextError, match=message):
            read_suite([str(write_suite(items))])


def test_the_digest_depends_on_the_items_and_not_on_their_order(
    write_suite: Callable[..., Path],
) -> None:
    def digest(*items: dict[str, Any]) -> str:
        return read_suite([str(write_suite(list(items)))]).digest

    assert digest(RIGHT, REPLY) == digest(REPLY, RIGHT)
    assert digest(RIGHT, REPLY) != digest({**RIGHT, "gold": 1}, REPLY)


def test_variations_of_variations_have_one_root(write_suite: Callable[..., Path]) -> None:
    items = [RIGHT, {**RIGHT, "id": "c", "perturbation_of": "a"}]
    items.append({**RIGHT, "id": "d", "perturbation_of": "c"})
    assert set(read_suite([str(write_suite(items))]).roots.values()) == {"a"}


def test_the_smoke_suite_has_thirty_items_of_each_dimension() -> None:
    suite = read_suite([])
    assert set(suite.dimensions) == set(KNOWN)
    assert all(len(items) >= 30 for items in suite.dimensions.values())
    assert all(item.id.startswith("smoke-") for item in suite.items)
    texts = [(item.prompt, item.options) for item in suite.items]
    assert len(set(texts)) == len(texts)
    # A model that always takes the first option, or the shorter one, is right in about half.
    for name, items in suite.dimensions.items():
        golds = [item.gold for item in items if item.gold is not None and not item.group]
        if golds and name != "out_of_distribution":
            assert 0.35 <= golds.count(0) / len(golds) <= 0.65, name
