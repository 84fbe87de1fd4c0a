"""The outcomes of a run as JUnit XML: a suite for each variant, a case for each stage and gate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from spectool.recipe.execute import Outcome
from spectool.recipe.summary import UNFINISHED


def as_junit(name: str, found: Mapping[str, Sequence[Outcome]]) -> bytes:
    """Return the XML of a run with this name; `found` has the outcomes by variant.

    Without any it is an error: the report of a run that did not end.
    A gate that does not hold is a failure, a stage that failed an error; what does not run is
    skipped.
    """
    root = ElementTree.Element("testsuites", name=name)
    if not found:
        suite = ElementTree.SubElement(
            root, "testsuite", name=name, tests="1", failures="0", errors="1", skipped="0"
        )
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="run")
        ElementTree.SubElement(case, "error", message=UNFINISHED)
    for variant, outcomes in found.items():
        suite = ElementTree.SubElement(root, "testsuite", name=variant or name)
        for outcome in outcomes:
            _add_stage(suite, outcome)
        counted = {"tests": "testcase", "failures": "*/failure", "errors": "*/error"}
        for key, path in {**counted, "skipped": "*/skipped"}.items():
            suite.set(key, str(len(suite.findall(path))))
        suite.set("time", f"{sum(outcome.seconds for outcome in outcomes):.3f}")
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _add_stage(suite: ElementTree.Element, outcome: Outcome) -> None:
    stage, where = outcome.planned.stage, suite.get("name", "")
    case = ElementTree.SubElement(
        suite, "testcase", classname=where, name=stage, time=f"{outcome.seconds:.3f}"
    )
    if outcome.state == "skipped":
        ElementTree.SubElement(case, "skipped", message=outcome.reason)
    elif outcome.state == "failed":
        ElementTree.SubElement(case, "error", message=outcome.reason)
    elif outcome.state == "gate" and not outcome.gates:
        # A certificate's promise.
        ElementTree.SubElement(case, "failure", message=outcome.reason)
    said = ElementTree.SubElement(case, "system-out")
    said.text = f"spectool {shlex.join(outcome.command)}"
    for gate in outcome.gates:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{where}.{stage}", name=f"gate {gate['expression']}"
        )
        if not gate["holds"]:
            value = "not a number" if gate["value"] is None else gate["value"]
            message = f"{gate['expression']} does not hold: {value}"
            ElementTree.SubElement(case, "failure", message=message)
