"""Lay the packages out as `spectool/…` links, so that type checkers can follow the folder table.

An editable install finds the folders through an import hook that type checkers cannot see.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "typing"


def main() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(TREE, ignore_errors=True)
    for package, folder in table["package-dir"].items():
        target = TREE / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for item in (ROOT / folder).iterdir():
            if item.name != "__pycache__":
                (target / item.name).symlink_to(item)


if __name__ == "__main__":
    main()
