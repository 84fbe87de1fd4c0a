"""The pages: the README's length, links between pages, and the commands that the README shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from spectool.cli import QUANTIZE, app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        found = (page.parent / place).resolve() if place else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_leads_to_every_guide_and_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for guide in (ROOT / "docs/guides").glob("*.md"):
        assert f"docs/guides/{guide.name}" in text


def shown() -> list[list[str]]:
    """The commands with output that the README shows."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^\$ (spectool .+)$", text, re.MULTILINE)]


def test_the_commands_that_the_readme_shows_can_be_pasted() -> None:
    root: Any = typer.main.get_command(app)
    commands = shown()
    assert len(commands) == 3
    for _, name, *words in commands:
        command = QUANTIZE.command(words.pop(0)) if name == "quantize" else root.commands[name]
        # Parsed, not run: an option that is not there would raise.
        command.make_context(name, list(words), resilient_parsing=False)
        assert all((ROOT / word).exists() for word in words if "/" in word)


@pytest.mark.slow
def test_the_output_that_the_readme_shows_is_what_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes to the digit; figures of quality within 2%, since processors round differently."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = ""
    for _, *words in shown():
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        found += result.output
    text = (ROOT / "README.md").read_text()
    (packed,) = re.findall(r"^packed: .*$", text, re.MULTILINE)
    assert packed in found
    for name in ("perplexity", "perplexity ratio", "same top token"):
        claimed, measured = (
            float(re.findall(rf"^{name}: ([\d.]+)", each, re.MULTILINE)[0])
            for each in (text, found)
        )
        assert measured == pytest.approx(claimed, rel=0.02), name
