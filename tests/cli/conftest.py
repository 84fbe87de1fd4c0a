"""Fixtures that run the command line in this process, and small inputs for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectool.cli import app


@dataclass
class Done:
    """Output and exit code of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="session")
def spectool() -> Callable[..., Done]:
    """Return `spectool("quantize", "rtn", model, out)`, which runs a command as a shell would."""

    def run(*words: object, stdin: str | bytes | None = None) -> Done:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text() * 2)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "from pathlib import Path"}, {"prompt": "def run(def run("}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
