from __future__ import annotations

from spectool.decode.drafters.none import NoDrafter
from spectool.decode.options import SamplingParams


def test_it_proposes_no_kind_of_node() -> None:
    assert NoDrafter().kinds(SamplingParams()) == ()
    assert NoDrafter.Config.from_text("") == NoDrafter().config
