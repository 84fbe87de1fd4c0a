"""The page in a real browser: its width, its colours, its texts without a script, sorting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spectool.evaluate.report.page import write_report
from spectool.evaluate.report.runs import read_runs

from . import results
from .browser import Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium"),
]
pytest.importorskip("matplotlib")

SORT = """(() => {
    const table = [...document.querySelectorAll("table")].find(
        (each) => each.caption.textContent === "Checkpoints, by stored bits");
    const column = [...table.tHead.rows[0].cells].findIndex((each) => each.textContent === "KL");
    const button = table.tHead.rows[0].cells[column].querySelector("button");
    const read = () => [...table.tBodies[0].rows].map(
        (row) => Number(row.cells[column].querySelector("data").value));
    const found = [];
    for (let turn = 0; turn < 2; turn++) { button.click(); found.push(read()); }
    return [...found, table.tHead.rows[0].cells[column].getAttribute("aria-sort")];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    # Names that no line can hold.
    long = {"10-eval": results.evaluation("q" * 90, 3, 1.0, 0.25)}
    runs = read_runs([results.write(folder / "run", results.ALL | long)])
    write_report(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("script", [True, False])
def test_no_width_overflows_and_nothing_goes_wrong(
    page: Path, browser: Browser, width: int, scheme: str, script: bool
) -> None:
    browser.problems.clear()
    browser.open(page, width=width, scheme=scheme, script=script)
    # Folded tables are opened as well.
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.body.innerText").count("packed-gptq-2") >= 2
    widths = "[...document.querySelectorAll('svg')].map((each) => each.clientWidth)"
    assert min(browser.evaluate(widths)) > 300
    assert browser.evaluate("document.querySelectorAll('thead button').length > 0") == script
    assert browser.problems == []


def test_colours_of_text_and_pictures_follow_the_scheme(page: Path, browser: Browser) -> None:
    read = """["body", "svg text", "svg path"].flatMap((name) => {
        const { backgroundColor, color, fill } = getComputedStyle(document.querySelector(name));
        return [backgroundColor, color, fill];
    })"""
    found = {}
    for scheme in ("light", "dark"):
        browser.open(page, width=1280, scheme=scheme)
        found[scheme] = browser.evaluate(read)
    assert found["light"][0] == "rgb(255, 255, 255)" and found["dark"][0] == "rgb(20, 23, 26)"
    # The text of the page, the text of a picture and the picture's ground.
    for index in (1, 5, 8):
        assert found["light"][index] != found["dark"][index], index


def test_a_click_sorts_by_number(page: Path, browser: Browser) -> None:
    browser.open(page, width=1280)
    up, down, state = browser.evaluate(SORT)
    assert up == sorted(up) == down[::-1] and len(up) == 3 and state == "descending"
