"""The example for CI: the workflows call the script, the script runs the recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples/ci"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_workflows_run_the_script_and_publish_what_it_writes() -> None:
    call = "examples/ci/run.sh examples/ci/release.yaml"
    github = read("github-actions.yml")["jobs"]["recipe"]["steps"]
    assert call in [step.get("run") for step in github]
    (upload,) = (step for step in github if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()" and "build/reports" in upload["with"]["path"].split()
    assert "build/release" in [step["with"]["path"] for step in github if "cache@" in str(step)]
    gitlab = read("gitlab-ci.yml")["recipe"]
    assert gitlab["script"] == [call] and "build/release" in gitlab["cache"]["paths"]
    assert gitlab["artifacts"]["reports"]["junit"] == "build/reports/junit.xml"
    assert gitlab["artifacts"]["when"] == "always"
    script = (FOLDER / "run.sh").read_text()
    for name in ("build/reports", "build/release", "junit.xml", "summary.md"):
        assert name in script
    assert os.access(FOLDER / "run.sh", os.X_OK)


def test_the_recipe_is_in_order() -> None:
    """Its options exist and its files are there."""
    from spectool.cli.run import make_commands
    from spectool.recipe.document import read_recipe
    from spectool.recipe.plan import STAGES, make_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recipe = read_recipe(FOLDER / "release.yaml", (), list(STAGES))
        (plan,) = make_plan(recipe, make_commands())
    assert [planned.stage for planned in plan.stages] == ["quantize", "eval", "bench"]


@pytest.mark.slow
def test_the_script_reports_and_exits_as_the_run_does(tmp_path: Path) -> None:
    summary = tmp_path / "step-summary.md"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN_DIR": str(tmp_path / "run"),
        "REPORTS_DIR": str(tmp_path / "reports"),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    script = [str(FOLDER / "run.sh"), "examples/ci/release.yaml"]
    done = subprocess.run(script, cwd=ROOT, env=environment)
    assert done.returncode == 0
    suite = ElementTree.parse(tmp_path / "reports/junit.xml").find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("6", "0")
    assert "perplexity_ratio<=1.05" in summary.read_text()
    result = json.loads((tmp_path / "run/results/06-bench.json").read_text())
    assert all(row["identical"] == row["prompts"] for row in result["drafters"])
    done = subprocess.run([*script, "eval.gate=kl<=0"], cwd=ROOT, env=environment)
    assert done.returncode == 3
    suite = ElementTree.parse(tmp_path / "reports/junit.xml").find("testsuite")
    assert suite is not None and suite.get("failures") == "1" and suite.get("skipped") == "1"
