"""The report in a headless browser: it sorts, filters, prints, fits each width, and axe finds nothing serious."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.runtime.report.write import write_report
from tests.report_sample import sample_report

BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(sample_report(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=BROWSER)
        yield launched
        launched.close()


def _open(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    tab.on("request", lambda request: None if request.url == page.as_uri() else said.append(request.url))
    tab.goto(page.as_uri())
    return tab, said


def _names(tab: Any) -> list[str]:
    names: list[str] = tab.eval_on_selector_all("#table tbody:first-of-type th", "all => all.map(e => e.dataset.value)")
    return names


def test_headings_sort_by_click_and_key_and_missing_figures_stay_last(browser: Any, paths: dict[str, Path]) -> None:
    tab, said = _open(browser, paths["html"])
    heading = tab.locator("#table th", has=tab.get_by_role("button", name="Size"))
    tab.get_by_role("button", name="Size").click()
    assert _names(tab) == ["student-q4", "q4-gguf", "q4-onnx", "q2-rtn"]
    assert heading.get_attribute("aria-sort") == "ascending"
    tab.get_by_role("button", name="Size").press("Enter")
    assert _names(tab) == ["q4-onnx", "q4-gguf", "student-q4", "q2-rtn"]
    assert heading.get_attribute("aria-sort") == "descending"
    assert tab.locator("#table [aria-sort='ascending'], #table [aria-sort='descending']").count() == 1
    assert said == []


def test_choices_theme_hints_and_hostile_text(browser: Any, paths: dict[str, Path]) -> None:
    tab, said = _open(browser, paths["html"])
    latency = tab.locator("#table th", has=tab.get_by_role("button", name="Prefill"))
    assert not latency.is_visible()
    tab.check("input[name=columns][value=latency]")
    assert latency.is_visible()
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    tab.locator("#scatters .mark:visible").first.focus()
    assert "loss" in tab.locator("#tip").inner_text()
    assert said == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (390, "light"), (768, "light"), (1280, "dark")])
def test_no_width_scrolls_sideways(browser: Any, paths: dict[str, Path], width: int, scheme: str) -> None:
    tab, said = _open(browser, paths["html"], width=width, scheme=scheme)
    for details in tab.locator("details").all():
        details.evaluate("e => e.setAttribute('open', '')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert len(tab.screenshot(full_page=True)) > 10_000
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_serious_violation(browser: Any, paths: dict[str, Path], width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    tab, said = _open(browser, paths["html"], width=width, scheme=scheme)
    tab.check("input[name=columns][value=all]")
    for details in tab.locator("details").all():
        details.evaluate("e => e.setAttribute('open', '')")
    found = axe.Axe().run(tab).response
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"] if _is_serious(v)] == []
    assert len(found["passes"]) > 40
    assert said == []


def _is_serious(violation: dict[str, Any]) -> bool:
    return violation["impact"] in {"serious", "critical"}


def _rows(tab: Any) -> list[str]:
    names: list[str] = tab.eval_on_selector_all(
        "#table tbody tr", "all => all.filter(e => e.checkVisibility()).map(e => e.cells[0].firstChild.textContent)"
    )
    return names


def test_candidates_are_filtered_by_typing_and_by_verdict(browser: Any, paths: dict[str, Path]) -> None:
    tab, said = _open(browser, paths["html"])
    everything = _rows(tab)
    tab.get_by_role("searchbox", name="Find a candidate").focus()
    tab.keyboard.type("LLAMA q4")
    assert _rows(tab) == ["q4-gguf", "student-q4", "reference", "base"]
    assert tab.locator("#found").inner_text() == "2 of 4 candidates"
    tab.keyboard.press("Tab")  # to the verdicts
    tab.keyboard.type("Do")
    assert _rows(tab) == ["student-q4", "reference", "base"]
    tab.get_by_role("button", name="Size").press("Enter")
    assert _rows(tab) == ["student-q4", "reference", "base"]
    tab.get_by_role("searchbox", name="Find a candidate").fill("")
    tab.get_by_role("combobox", name="Verdict").select_option("")
    assert sorted(_rows(tab)) == sorted(everything)
    assert tab.locator("#found").inner_text() == ""
    assert said == []


def test_pictures_are_read_mark_by_mark(browser: Any, paths: dict[str, Path]) -> None:
    tab, _ = _open(browser, paths["html"])
    read = tab.locator("#scatters svg:visible").aria_snapshot()
    assert read.count("img ") == 4  # three candidates and the reference
    assert "q4-gguf, ship: Size on disk 105.5 MB, loss −0.40 points" in read
    assert "text" not in read


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_white_whole_and_not_too_narrow(browser: Any, paths: dict[str, Path], scheme: str) -> None:
    tab, said = _open(browser, paths["html"], width=718, scheme=scheme)  # A4 between Chromium's margins
    tab.locator("#search").fill("q4-gguf")
    folded = tab.locator("details:not([open])").count()
    tab.click("#theme")  # the reader's own choice does not reach paper either
    tab.emulate_media(media="print", color_scheme=scheme)
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    assert tab.locator("nav:visible, input:visible, select:visible, button.quiet:visible").count() == 0
    assert tab.locator("[data-part]:not(:visible)").count() == 0
    assert {"q4-gguf", "q4-onnx", "student-q4", "q2-rtn"} < set(_rows(tab))
    assert tab.locator("details:not([open])").count() == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details:not([open])").count() == folded
    assert said == []
