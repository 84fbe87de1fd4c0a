"""Python's standard library as text: what the bundled checkpoint is trained and measured on.

It lies on every machine that runs spectool. A twentieth of the files, chosen by their names, is
held out: of training, calibration and heads alike. Imports neither torch nor transformers.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests repeat themselves, code pages are tables of numbers; neither teaches a small model much.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELD_OUT = 20
# Longer answers would be cut by the small model's context.
LONGEST_ANSWER = 1200


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its name relative to the library, its text, whether it is held out."""

    name: str
    text: str
    held_out: bool


def documents() -> Iterator[Document]:
    """All sources, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0
            yield Document(name.as_posix(), text, held_out)


def conversations(document: Document) -> Iterator[list[dict[str, str]]]:
    """What something does, answered by its docstring; and its code, asked for by its first line."""
    lines = document.text.splitlines()
    try:
        with warnings.catch_warnings():
            # Some old sources hold escapes that today's compiler warns of.
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        said = ast.get_docstring(node)
        if not said:
            continue
        brief = said.split("\n\n")[0].strip()
        if len(brief) < LONGEST_ANSWER:
            yield _exchange(f"What does {node.name} in {module} do?", brief)
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if isinstance(node, ast.FunctionDef) and len(source) < LONGEST_ANSWER:
            yield _exchange(f"Write {node.name}: {' '.join(brief.split())}", source)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
