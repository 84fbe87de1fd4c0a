"""Pictures by matplotlib: names that can be drawn to, figures without a display, equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectool.errors import UsageError, require
from spectool.files import replacing

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colour-blind safe palette without its pale yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def check_picture(path: Path) -> None:
    """Check, before the long run, that a picture can be drawn and written to `path`.

    Raises:
        UsageError: the name ends in neither .png nor .svg, or the folder does not exist.
        MissingExtra: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: expected a name that ends with .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    _matplotlib()


def make_figure(width: float, height: float) -> Any:
    """Make an empty figure, in inches."""
    return _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure; equal figures give equal bytes."""
    # No date and no random ids.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    with replacing(path) as temporary, _matplotlib().rc_context({"svg.hashsalt": "spectool"}):
        figure.savefig(temporary, dpi=200, metadata=metadata)


def _matplotlib() -> Any:
    """Import matplotlib without pyplot, which would look for a display."""
    require("matplotlib.figure", extra="eval", reason="--plot")
    return require("matplotlib", extra="eval", reason="--plot")
