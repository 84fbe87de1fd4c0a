"""Python's standard library as text to train and evaluate the bundled checkpoint on.

Every machine that runs spectool has it. A twentieth of the files, chosen by a hash of their names,
is held out of training, calibration and head training. Imports neither torch nor transformers.
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

# Tests are repetitive and code pages are tables of numbers: poor training text.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELD_OUT = 20
# In characters; longer answers would not fit the small model's context.
LONGEST_ANSWER = 1200


@dataclass(frozen=True, slots=True)
class Document:
    """Source file: its name relative to the library, its text, and whether it is held out."""

    name: str
    text: str
    held_out: bool


def read_documents() -> Iterator[Document]:
    """Yield all source files, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0
            yield Document(name.as_posix(), text, held_out)


def make_conversations(document: Document) -> Iterator[list[dict[str, str]]]:
    """Yield conversations made of a file's docstrings.

    For each class and function a question what it does, answered by its docstring; for each
    function also a request to write it, answered by its code.
    """
    lines = document.text.splitlines()
    try:
        with warnings.catch_warnings():
            # Some old sources hold escape sequences that Python warns about.
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        brief = docstring.split("\n\n")[0].strip()
        if len(brief) < LONGEST_ANSWER:
            yield _exchange(f"What does {node.name} in {module} do?", brief)
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if isinstance(node, ast.FunctionDef) and len(source) < LONGEST_ANSWER:
            yield _exchange(f"Write {node.name}: {' '.join(brief.split())}", source)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
