"""Pictures by matplotlib in one style: as files, and as SVG inside an HTML page.

Drawing code runs inside `style`. Equal pictures give equal bytes. Inside a page the colours are CSS
variables (`--ink`, `--series-1`, ...), so that a picture follows the page into dark mode.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from spectool.errors import UsageError, require
from spectool.files import replacing

SUFFIXES = (".png", ".svg")

PAPER, INK, MUTED, LINE = "#ffffff", "#1b1f24", "#5c6570", "#d3d8de"
# Series, in an order that is told apart by the colour-blind; each has a contrast of 3 to PAPER.
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b8478c", "#94690d", "#536779")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Large values of a heat map; small ones are the same colour with less of it.
HEAT = "#e8743b"
# Numbers inside a heat map and other small print, in points; the rest is larger.
SMALL = 7.5

# Name of the CSS variable of each colour.
VARIABLES = {
    PAPER: "paper",
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    HEAT: "heat",
    **{colour: f"series-{number}" for number, colour in enumerate(COLOURS, start=1)},
}

_STYLE = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.unicode_minus": False,
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "text.color": INK,
    # A name may hold a dollar sign.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
    # Texts stay texts: smaller, and read by search and by screen readers.
    "svg.fonttype": "none",
    "svg.hashsalt": "spectool",
}

_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


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
    load_matplotlib("--plot")


def load_matplotlib(reason: str) -> Any:
    """Import matplotlib without pyplot, which would look for a display.

    Raises:
        MissingExtra: it is not installed; `reason` needs it.
    """
    require("matplotlib.figure", extra="eval", reason=reason)
    return require("matplotlib", extra="eval", reason=reason)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and write pictures in the style, whatever the user's settings of matplotlib are."""
    matplotlib = load_matplotlib("a picture")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # A letter that the font lacks is a box in a PNG, and itself in an SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def make_figure(width: float, height: float) -> Any:
    """Make an empty figure, in inches."""
    return load_matplotlib("a picture").figure.Figure(figsize=(width, height), layout="constrained")


def render(figure: Any, kind: str) -> bytes:
    """Return a figure as the bytes of a `.png` or an `.svg` file; equal figures, equal bytes."""
    written = io.BytesIO()
    # No date and no random ids.
    metadata = {"Date": None} if kind == ".svg" else None
    figure.savefig(written, format=kind.removeprefix("."), dpi=200, metadata=metadata)
    return written.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file."""
    data = render(figure, path.suffix.lower())
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def inline_svg(figure: Any, name: str, title: str, *, hints: Mapping[str, str]) -> str:
    """Return a figure as an `svg` element for an HTML page.

    `name`: prefix of the ids, which differ between the pictures of a page. `title`: what the
    picture shows, in a sentence. `hints`: texts shown at artists, by the artist's gid.
    """
    for prefix, space in (("", _SVG), ("xlink", _LINK)):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(render(figure, ".svg"))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    metadata = root.find(f"{{{_SVG}}}metadata")
    if metadata is not None:
        root.remove(metadata)
    for element in root.iter():
        hint = hints.get(element.get("id", ""))
        for key, value in element.attrib.items():
            element.set(key, _prefix_ids(key, value, name))
        if "style" in element.attrib:
            element.set("style", _use_variables(element.attrib["style"]))
        if hint is not None:
            note = ElementTree.Element(f"{{{_SVG}}}title")
            note.text = hint
            element.insert(0, note)
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    return ElementTree.tostring(root, encoding="unicode")


def _prefix_ids(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-")


def _use_variables(css: str) -> str:
    """Replace the style's colours by CSS variables."""
    return re.sub(
        "#[0-9a-f]{6}",
        lambda found: f"var(--{VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0],
        css,
    )
