"""The page holds the results' figures, loads nothing, and shows any name as it is."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectool.cli import app
from spectool.errors import InputError
from spectool.evaluate.report import page as page_module
from spectool.evaluate.report.content import tell_apart
from spectool.evaluate.report.page import write_report
from spectool.evaluate.report.runs import read_runs
from spectool.picture import COLOURS, VARIABLES

from . import results

pytest.importorskip("matplotlib")

_VOID = {"meta", "link", "br", "img", "input", "hr"}
CSS = (Path(page_module.__file__).parent / "page.css").read_text()


class Page(HTMLParser):
    """What a page holds: its elements in order, with the text inside of each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, "an element is left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag not in _VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Return the attributes and the text of each element of a kind."""
        return [
            (attributes, "".join(self.texts[index]).strip())
            for index, (name, attributes) in enumerate(self.elements)
            if name == tag
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The page of all results, with what was written."""
    folder = tmp_path_factory.mktemp("report")
    runs = read_runs([results.write(folder / "run")])
    return folder, write_report(runs, folder / "report.html", folder / "pictures")


@pytest.fixture(scope="module")
def html(made: tuple[Path, list[Path]]) -> str:
    return (made[0] / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def numbers(value: Any) -> set[float]:
    """All numbers in a result, as the page is to show them."""
    if isinstance(value, dict):
        left_out = ("schema_version", "format_version", "machine", "read")
        return set().union(*(numbers(v) for k, v in value.items() if k not in left_out))
    if isinstance(value, list):
        return set().union(*map(numbers, value)) if value else set()
    return {value} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def test_every_figure_of_the_results_is_on_the_page(page: Page) -> None:
    shown = {float(attributes["value"] or "nan") for attributes, _ in page.all("data")}
    text = " ".join(page.texts[0])
    for name, data in results.ALL.items():
        if name != "08-peers":
            for number in numbers(data):
                # Ends of intervals and members of short lists stand in texts.
                rounded = f"{number:.4g}", f"{number:.3e}"
                assert number in shown or any(each in text for each in rounded), (name, number)


def test_the_page_loads_nothing(page: Page, html: str) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form"), tag
        for key in ("src", "srcset", "href", "xlink:href", "action", "poster"):
            value = attributes.get(key)
            assert value is None or value == "data:," or value.startswith("#"), (tag, key, value)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    (policy,) = (m["content"] for m, _ in page.all("meta") if "content" in m and "http-equiv" in m)
    assert policy is not None and "default-src 'none'" in policy


def test_headings_tables_and_pictures_can_be_read_by_others(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "href", "xlink:href"):
            if (value := attributes.get(key)) and value != "data:,":
                assert value.removeprefix("#") in ids
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in attributes for attributes, _ in page.all("th"))
    pictures = page.all("svg")
    assert len(pictures) == 10 and all(each["role"] == "img" for each, _ in pictures)
    titles = [text for each, text in page.all("title") if "-title" in (each.get("id") or "")]
    assert titles == [text for _, text in page.all("figcaption")]
    assert page.all("html")[0][0]["lang"] == "en"


def test_pictures_follow_the_page_into_the_dark(html: str) -> None:
    pictures = "".join(re.findall("<svg.*?</svg>", html, re.DOTALL))
    assert not re.search("(?:fill|stroke): #", pictures)
    used = set(re.findall(r"var\(--([\w-]+)\)", pictures))
    assert {"ink", "paper", "heat", "series-1", "series-2"} <= used <= set(VARIABLES.values())
    for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL):
        assert set(VARIABLES.values()) <= set(re.findall(r"--([\w-]+):", block))


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_colours_have_contrast_in_both_schemes() -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    )
    assert {name: light[name] for name in VARIABLES.values()} == {
        name: colour for colour, name in VARIABLES.items()
    }
    for scheme in (light, dark):
        for name in ("ink", "muted", "link", "good", "bad"):
            for below in ("paper", "tint"):
                assert contrast(scheme[name], scheme[below]) >= 4.5, (name, below)
        for number in range(1, 1 + len(COLOURS)):
            assert contrast(scheme[f"series-{number}"], scheme["paper"]) >= 3, number
    assert luminance(light["paper"]) > 0.9 and luminance(dark["paper"]) < 0.05


def test_a_failed_gate_comes_first_and_not_by_colour_alone(page: Page) -> None:
    rows = [text for _, text in page.all("tr")]
    gates = [row for row in rows if "perplexity_ratio<=1.05" in row]
    assert "does not hold" in gates[0] and "1.25" in gates[0] and "holds" in gates[1]
    assert page.all("dt")[0][1] == "Gates" and "1 of 2 fail" in page.all("dd")[0][1]


def test_depth_is_the_share_of_steps_that_accept_so_many_tokens(page: Page) -> None:
    rows = [text for _, text in page.all("tr")]
    assert any(row.startswith("heads (hydra") and "50.0%37.5%" in row for row in rows)
    assert "ngram:max_n=3 on small68.8%34.4%" in rows
    assert "ngram:max_n=3 on small1.51.751.875" in rows
    assert "ngram:max_n=3 on small, batch size 41.51.751.875" in rows


def test_an_audit_says_its_verdict_and_what_it_could_not_measure(page: Page) -> None:
    (row,) = (text for _, text in page.all("tr") if text.startswith("fairness"))
    assert "fail" in row and "-6.25 [-9.375, -3.125]" in row
    texts = [text for _, text in page.all("p")]
    assert "09-trust: not measured: privacy (no items)." in texts
    assert "09-trust: Proxies in English." in texts


def test_points_and_cells_say_what_they_are(page: Page) -> None:
    hints = [text for _, text in page.all("title")]
    assert "packed-rtn-3: 3.378 bits, 1.008 [0.9453, 1.039]" in hints
    assert "block 1, mlp.down_proj: 0.25" in hints
    assert any("the largest is 0.25, model.layers.1" in text for text in hints)


def test_the_worst_decoder_layer_of_all_checkpoints_is_named(page: Page) -> None:
    hints = [text for _, text in page.all("title")]
    worst = max(
        (run for run in results.ALL.values() if "decoder_layers" in run),
        key=lambda run: run["decoder_layers"][1]["error"]["value"],
    )
    error = worst["decoder_layers"][1]["error"]["value"]
    title = f"the largest is {error:.4g}, model.layers.1 of {worst['model']}"
    assert any(title in text for text in hints)
    assert any(
        text.startswith(f"model.layers.1 of {worst['model']}: {error:.4g} [") for text in hints
    )
    rows = [text for _, text in page.all("tr") if text.startswith("model.layers.1")]
    assert any("0.9688 [0.9375, 1]" in text and "0.9922 [" in text for text in rows)
    # No result has figures of attention, so no table has their columns.
    assert not any("Collapsed heads" in text for _, text in page.all("th"))


def test_layers_without_a_number_and_two_texts_are_shown(tmp_path: Path) -> None:
    one, other = (results.evaluation("rtn", 3, 1.0, 0.5) for _ in range(2))
    other["decoder_layers"][0]["error"] = None
    folder = results.write(tmp_path / "run", {"one": one, "other": other})
    write_report(read_runs([folder]), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    captions = [text for _, text in page.all("caption") if text.startswith("Decoder layers")]
    assert captions == ["Decoder layers of packed-rtn-3", "Decoder layers of packed-rtn-3, other"]
    squares = [text for _, text in page.all("title") if re.match(r"model\.layers\.\d of", text)]
    assert len(squares) == 3


def test_checkpoints_of_variants_are_told_apart(tmp_path: Path) -> None:
    """Their directories have the same name, in other folders."""
    bench = next(run for run in results.ALL.values() if "drafters" in run)
    trained = next(run for run in results.ALL.values() if "conditional" in run)
    chosen = {}
    for bits in (2, 3):
        chosen[f"{bits}-bench"] = bench | {"model": f"release/bits={bits}/packed"}
        chosen[f"{bits}-heads"] = trained | {"out": f"release/bits={bits}/heads"}
    folder = results.write(tmp_path / "run", chosen)
    write_report(read_runs([folder]), tmp_path / "report.html", tmp_path / "pictures")
    page = Page((tmp_path / "report.html").read_text())
    rows = [text for _, text in page.all("tr")]
    for bits in (2, 3):
        assert any(f"bits={bits}/packed" in text for text in rows)
        assert any(text.startswith(f"bits={bits}/heads (") for text in rows)
    assert (tmp_path / "pictures/speed-bits-2-packed.svg").exists()
    assert tell_apart(["a/b/c", "c", "d/c"]) == {"a/b/c": "b/c", "c": "c", "d/c": "d/c"}


def test_a_logarithmic_axis_has_plain_numbers(tmp_path: Path) -> None:
    chosen = {
        f"{bits}-eval": results.evaluation("rtn", bits, 1 + kl, kl)
        for bits, kl in ((2, 0.0166), (3, 0.00412), (4, 0.00178))
    }
    folder = results.write(tmp_path / "run", chosen)
    write_report(read_runs([folder]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "mathdefault" not in page and "0.002" in page and "0.01" in page


def test_pictures_are_files_too(made: tuple[Path, list[Path]]) -> None:
    folder, written = made
    names = {path.stem for path in (folder / "pictures").iterdir()}
    assert {"ratio-stories", "kl-stories", "depth", "tasks", "layers-packed-rtn-3"} <= names
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        f"{name}{kind}" for name in names for kind in (".png", ".svg")
    }
    assert sorted(written) == sorted([*(folder / "pictures").iterdir(), folder / "report.html"])
    assert (folder / "pictures/depth.png").read_bytes().startswith(b"\x89PNG")


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    chosen = {name: results.ALL[name] for name in ("04-eval", "06-train-heads")}
    runs = read_runs([results.write(tmp_path / "run", chosen)])
    write_report(runs, tmp_path / "one.html")
    words = ["report", str(tmp_path / "run"), "-o", str(tmp_path / "other.html"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["results"] == 2
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_any_name_is_shown_as_it_is(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>&\"'$x$ \x1b[31m\ud800{{ 7*7 }}"
    shown = "</script><script>alert(1)</script>&\"'$x$ \ufffd[31m\ufffd{{ 7*7 }}"
    data = results.quantize("rtn", 3, 0.015625) | {"out": name, "method": name, "command": name}
    data["layers"] = [{"name": f"model.layers.0.{name}", "bits": 3, "error": 0.5}]
    other = results.evaluation("rtn", 3, 1.0, 0.5) | {"model": name, "command": name}
    folder = results.write(tmp_path / "run", {"a<b": data, "c&d": other})
    write_report(read_runs([folder]), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("script")) == 1
    # The command, and the matrix's name.
    codes = [text for _, text in page.all("code")]
    assert shown in codes and f"model.layers.0.{shown}" in codes
    assert any(f"Error of each matrix of {shown}" in text for _, text in page.all("figcaption"))
    assert any("a<b" in text for _, text in page.all("th"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"schema_version": 3, "kl": NaN}', "not JSON: NaN"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[1]", "no object that a command printed with --json"),
        ('{"a": 1}', "no object that a command printed with --json"),
        ('{"schema_version": 3, "gates": [{}]}', "not a result as this version"),
        ('{"schema_version": 3, "gates": 7}', "not a result as this version"),
        ('{"schema_version": 3, "layers": [{"error": 1}]}', "not a result as this version"),
        ('{"schema_version": 3, "out": 3, "bits_per_weight": 4}', "not a result as this version"),
        ('{"window_tokens": {"a": []}, "rows": 1}', "not a result as this version"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["report", str(path), "-o", str(tmp_path / "r.html"), "--pictures", str(tmp_path / "p")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and message in done.stderr and str(path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == ([] if content is None else [path])


def test_a_folder_may_hold_other_files(tmp_path: Path) -> None:
    whole = tmp_path / "run"
    run = results.write(whole / "results", {"02-eval": results.evaluation("rtn", 3, 1.0, 0.5)})
    (whole / "packed").mkdir()
    (whole / "packed" / "config.json").write_text('{"model_type": "llama"}')
    (whole / "packed" / "broken.json").write_text("{")
    stage = {"stage": "eval", "command": ["spectool", "eval", "a b"], "exit_code": 3}
    stages = [{**stage, "seconds": 61.5}]
    record = {"format_version": 1, "machine": results.MACHINE, "stages": stages}
    (whole / "run.json").write_text(json.dumps(record))
    (found,) = read_runs([whole])
    assert found.name == "02-eval" and found.command == "spectool eval 'a b'"
    write_report([found], tmp_path / "r.html")
    text = "".join(Page((tmp_path / "r.html").read_text()).texts[0])
    assert "a gate does not hold" in text and "61.5" in text
    # Given twice, it is shown once.
    assert len(read_runs([whole, run / "02-eval.json"])) == 1
    (run / "03-bench.json").write_text("{")
    with pytest.raises(InputError, match=r"03-bench\.json: not JSON"):
        read_runs([whole])
    with pytest.raises(InputError, match="no results in this folder"):
        read_runs([whole / "packed"])
