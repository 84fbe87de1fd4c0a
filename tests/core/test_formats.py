"""Names of format 1 are converted to those of the present version while reading."""

from typing import Any

import pytest

from spectool.checkpoint.formats import FORMAT_VERSION, upgrade_config, upgrade_heads

CONFIG: dict[str, Any] = {
    "quant_method": "spectool",
    "format_version": 1,
    "made_by": {"head": {"method": "vq", "options": {}}, "method": "rtn", "seed": 0},
    "modules": {
        "lm_head": {"method": "vq", "options": {}, "shape": [8, 4], "outside": "head"},
        "model.embed": {"method": "int8", "options": {}, "shape": [8, 4], "outside": "embedding"},
        "layers.0.head": {"method": "rtn", "options": {}, "shape": [8, 4]},
    },
    "head": "kept",
}


def test_names_and_values_of_a_configuration_are_those_of_now() -> None:
    found = upgrade_config(CONFIG)
    assert found["format_version"] == FORMAT_VERSION
    assert found["made_by"] == {"lm_head": CONFIG["made_by"]["head"], "method": "rtn", "seed": 0}
    assert found["modules"]["lm_head"]["outside"] == "lm_head"
    assert found["modules"]["model.embed"] == CONFIG["modules"]["model.embed"]
    # Names of matrices and unknown keys are nobody's to change.
    assert "layers.0.head" in found["modules"] and found["head"] == "kept"
    assert CONFIG["modules"]["lm_head"]["outside"] == "head", "the given object stays"


def test_names_of_a_record_of_heads_are_those_of_now() -> None:
    record = {
        "format_version": 1,
        "options": {"law_weight": 0.5, "num_heads": 4},
        "training": {"begin": None, "pack": True, "looks": [{"step": 0}], "seed": 1},
    }
    assert upgrade_heads(record) == {
        "format_version": FORMAT_VERSION,
        "options": {"probs_weight": 0.5, "num_heads": 4},
        "training": {
            "init_from": None,
            "sequence_packing": True,
            "evaluations": [{"step": 0}],
            "seed": 1,
        },
    }


@pytest.mark.parametrize("version", [2, 3, True, None, "1"])
def test_other_versions_are_left_to_who_reads_them(version: Any) -> None:
    record = {**CONFIG, "format_version": version}
    assert upgrade_config(record) == record
    assert upgrade_heads(record) == record
