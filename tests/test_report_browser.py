"""The report in a real browser: Debian's chromium, headless. `apt-get install chromium chromium-driver` brings it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miwv_fast
from miwv_fast.ranker import selection_size
from miwv_fast.scores import Scores
from miwv_fast.sources import open_source
from support import random_scores, text_embedder
from test_report import HOSTILE
from test_scorer import make_rows

pytest.importorskip("bokeh")
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic --window-size=1280,900"
)
RECORDS, REJECTED = 400, 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_report(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a report from disk and waits until it is drawn; what was emulated for it ends with the test."""

    def go(path: Path, *, dark: bool = False, width: int = 1280, height: int = 900) -> Any:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        return browser

    yield go
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def scores() -> Scores:
    rows = make_rows("alpaca", RECORDS)
    for number, row in enumerate(rows):
        row.update(instruction=f"Question {number} of many", source=("web", "book", "forum")[number % 3])
    return Scores(random_scores(RECORDS, REJECTED), {}, open_source(rows))


@pytest.fixture(scope="module")
def report(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    scores.report(path, top="10%")
    return path


def text(browser: Any, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)


def numbers(browser: Any) -> list[int]:
    """The record numbers that the table shows, from the top."""
    return [int(tag.text.removeprefix("#")) for tag in browser.find_elements(By.CSS_SELECTOR, ".number-tag")]


def search(browser: Any, query: str) -> None:
    box = browser.find_element(By.ID, "search")
    box.clear()
    box.send_keys(query)
    # Behind a short pause of the typist the table is filled anew; it is filled when the query is the one typed.
    WebDriverWait(browser, 10).until(lambda b: b.execute_script("return listed.query") == query)


def check_selection(browser: Any, scores: Scores, size: int) -> None:
    """Counts, threshold, and the points in the selection's layer of each plot are those of the best `size`."""
    threshold = scores.table["miwv"][int(scores.rank()[size - 1])].as_py()
    assert text(browser, "selected-count") == f"{size:,} of {RECORDS:,} records"
    assert text(browser, "selected-threshold") == f"MIWV ≥ {threshold:+.3f} nats per token".replace("-", "−")
    layers = "return scatterPlots().map(({ find }) => [find('points').data.x.length, find('best').data.x.length])"
    # Plots follow the slider when it rests.
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(layers) == [[RECORDS - REJECTED, size]] * 3)
    lines = browser.execute_script(
        "return Object.values(plots).map(({ find }) => find('threshold').location ?? find('threshold').y_intercept)"
    )
    assert lines == pytest.approx([threshold] * 4, abs=1e-6)


def test_it_is_drawn_without_network(open_report, report, scores):
    browser = open_report(report)
    check_selection(browser, scores, 40)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    painted = browser.execute_script(
        """return Object.values(plots).map(({ view }) => {
             const { width, height } = view.canvas_view.primary.canvas;
             const pixels = view.canvas_view.primary.ctx.getImageData(0, 0, width, height).data;
             return new Set(new Uint32Array(pixels.buffer)).size;
           })"""
    )
    assert all(colors > 5 for colors in painted)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plot[role=img][aria-label]")) == 4


def test_slider_by_keyboard(open_report, report, scores):
    browser = open_report(report)
    slider = browser.find_element(By.ID, "share")
    slider.send_keys(Keys.HOME)
    WebDriverWait(browser, 10).until(lambda b: text(b, "selected-count").startswith("1 of"))
    check_selection(browser, scores, 1)
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    WebDriverWait(browser, 10).until(lambda b: text(b, "selected-count").startswith("3 of"))
    check_selection(browser, scores, 3)
    assert slider.get_attribute("aria-valuetext") == "0.75 %, 3 records"
    # 3 of 400 is what 0.75 % selects, and so does 0.8 %.
    assert browser.find_element(By.ID, "share-number").get_attribute("value") == "0.8"
    slider.send_keys(Keys.END)
    WebDriverWait(browser, 10).until(lambda b: text(b, "selected-count").startswith("397 of"))
    check_selection(browser, scores, 397)


@pytest.mark.parametrize("percent", ["5", "0.29", "33.3", "100"])
def test_share_by_number(open_report, report, scores, percent):
    browser = open_report(report)
    box = browser.find_element(By.ID, "share-number")
    box.clear()
    box.send_keys(percent)
    size = min(selection_size(f"{percent}%", RECORDS), RECORDS - REJECTED)
    WebDriverWait(browser, 10).until(lambda b: text(b, "selected-count").startswith(f"{size} of"))
    check_selection(browser, scores, size)
    assert box.get_attribute("value") == percent


def test_shares_of_the_field(open_report, report, scores):
    browser = open_report(report)
    assert text(browser, "shares-title") == "Selection against the whole, by source"
    rows = browser.find_elements(By.CSS_SELECTOR, "#shares-body tr")
    best = scores.rank()[:40]
    for number, (name, row) in enumerate(zip(("web", "book", "forum"), rows, strict=True)):
        whole, part = (RECORDS - number + 2) // 3, int(np.sum(best % 3 == number))
        cells = [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td.number")]
        assert cells[0] == name and cells[1] == str(whole) and cells[3] == str(part)
        assert cells[5] == f"{part / 40 / (whole / RECORDS):.2f}×"


def test_table_views_sorting_and_pages(open_report, report, scores):
    browser = open_report(report)
    ranking = scores.rank().tolist()
    assert numbers(browser) == ranking[:25]
    browser.find_element(By.ID, "next").click()
    assert numbers(browser) == ranking[25:50]
    views = {box.get_attribute("value"): box for box in browser.find_elements(By.NAME, "view")}
    views["bottom"].send_keys(Keys.SPACE)
    assert numbers(browser) == ranking[396:371:-1]
    views["rejected"].send_keys(Keys.SPACE)
    assert numbers(browser) == [397, 398, 399]
    views["all"].send_keys(Keys.SPACE)
    assert text(browser, "table-count") == "1–25 of 400 records"
    browser.find_element(By.CSS_SELECTOR, "[data-sort=tokens]").click()
    tokens = scores.table["response_tokens"].to_pylist()
    shown = [tokens[number] for number in numbers(browser)]
    assert shown == sorted((t for t in tokens if t is not None), reverse=True)[:25]
    heading = browser.switch_to.active_element
    assert heading.get_attribute("data-sort") == "tokens"
    heading.send_keys(Keys.ENTER)
    assert [tokens[number] for number in numbers(browser)][:3] == [None] * 3
    assert browser.find_element(By.CSS_SELECTOR, "[aria-sort=ascending]").text.startswith("Tokens")


def test_search(open_report, report):
    browser = open_report(report)
    browser.find_element(By.CSS_SELECTOR, "[name=view][value=all]").click()
    search(browser, "question 217 OF")
    assert numbers(browser) == [217]
    search(browser, "#21")
    assert numbers(browser) == [21]
    search(browser, "empty_response")
    assert numbers(browser) == [397, 398, 399]
    search(browser, "no such text")
    assert numbers(browser) == [] and text(browser, "table-count") == "No record matches."


def test_a_record_opens_by_keyboard(open_report, report, scores):
    browser = open_report(report)
    best = int(scores.rank()[0])
    opener = browser.find_element(By.ID, f"row-{best}")
    assert opener.get_attribute("aria-expanded") == "false"
    opener.send_keys(Keys.ENTER)
    opener = browser.switch_to.active_element
    assert opener.get_attribute("id") == f"row-{best}" and opener.get_attribute("aria-expanded") == "true"
    assert opener.get_attribute("aria-controls") == f"detail-{best}"
    detail = browser.find_element(By.ID, f"detail-{best}")
    neighbor = scores.table["neighbor"][best].as_py()
    for told in (f"Question {best} of many", f"Question {neighbor} of many", f"record #{neighbor}", f"id-{best}"):
        assert told in detail.text or told.startswith("id-")
    opener.send_keys(Keys.ENTER)
    assert browser.find_elements(By.ID, f"detail-{best}") == []


def test_every_control_is_reached_by_tab(open_report, report):
    browser = open_report(report)
    reached = []
    for _ in range(20):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("data-sort") or active.text)
    assert reached[:5] == ["Skip to the records", "share", "share-number", "coloring", ""]
    assert reached[5:9] == ["search", "rank", "miwv", "one"]
    assert reached[14].startswith("row-")


def test_a_click_on_a_point_opens_its_record(open_report, report):
    browser = open_report(report)
    browser.execute_script("document.getElementById('plot-length').scrollIntoView({ block: 'center' })")
    x, y, record = browser.execute_script(
        """const { view, x, y } = plots.length, { left, top } = view.canvas_view.el.getBoundingClientRect();
           const at = (i) => [view.frame.x_scale.compute(x[i]), view.frame.y_scale.compute(y[i])];
           // A point that no other lies near.
           const all = Array.from(x, (_, i) => at(i));
           const far = ([a, b], [c, d]) => Math.hypot(a - c, b - d) > 9;
           const alone = all.findIndex((one, i) => all.every((other, j) => i === j || far(one, other)));
           return [left + all[alone][0], top + all[alone][1], columns.record[alone]];"""
    )
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y)).pointer_down().pointer_up()
    actions.perform()
    WebDriverWait(browser, 10).until(lambda b: b.execute_script("return listed.query") == f"#{record}")
    assert numbers(browser) == [record]
    assert browser.find_element(By.ID, f"row-{record}").get_attribute("aria-expanded") == "true"


def test_colors_of_the_field(open_report, report):
    browser = open_report(report)
    browser.find_element(By.CSS_SELECTOR, "#coloring option[value=field]").click()
    assert [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#legend li")] == ["web", "book", "forum"]
    assert browser.execute_script("return new Set(plots.losses.find('points').data.color).size") == 3
    browser.find_element(By.CSS_SELECTOR, "#coloring option[value=selection]").click()
    assert browser.execute_script("return new Set(plots.losses.find('points').data.color).size") == 1


def luminance(color: str) -> float:
    """Relative luminance of a color as the browser tells it, `rgb(r, g, b)`; WCAG 2.2."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_can_be_read(open_report, report, dark):
    """Text has a contrast of 4.5, WCAG's level AA, against the page, on it and on the cards."""
    browser = open_report(report, dark=dark)
    color = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    papers = [browser.execute_script(color, name, "backgroundColor") for name in ("body", "figure")]
    assert (luminance(papers[0]) < 0.1) is dark
    inks = [browser.execute_script(color, name, "color") for name in ("body", "p", "dt", ".number-tag", "thead th")]
    for ink, paper in itertools.product(inks, papers):
        light, deep = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, (ink, paper)
    axis = browser.execute_script("return plots.losses.plot.below[0].major_label_text_color")
    assert axis == browser.execute_script("return style('--ink-soft')")


def test_the_theme_follows_the_system(open_report, report):
    browser = open_report(report)
    axis = "return plots.length.plot.left[0].axis_label_text_color"
    before = browser.execute_script(axis)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(axis) != before)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(open_report, report, scores, width):
    browser = open_report(report, width=width)
    browser.execute_script(f"showRecord({int(scores.rank()[0])})")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_hostile_records_stay_text(open_report, tmp_path):
    attack = ["<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "x" * 1990 + "<b>"]
    texts = [*HOSTILE, *attack]
    rows = [
        {"id": told, "instruction": told, "input": "", "output": told, "source": f"{number % 2}{told[:50]}"}
        for number, told in enumerate(texts * 2)
    ]
    Scores(random_scores(len(rows)), {}, open_source(rows)).report(tmp_path / "r.html", field="source")
    browser = open_report(tmp_path / "r.html")
    browser.find_element(By.CSS_SELECTOR, "#coloring option[value=field]").click()
    for number, row in enumerate(rows):
        browser.execute_script("showRecord(arguments[0])", number)
        shown = browser.execute_script(
            "return [...document.querySelectorAll('.detail .text')].map((e) => e.textContent)"
        )
        assert shown[:2] == [row["instruction"], row["output"]]
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.CSS_SELECTOR, "main script, main img, main b") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    values = {value.get_attribute("textContent") for value in browser.find_elements(By.CSS_SELECTOR, "#shares-body th")}
    assert values == {row["source"] for row in rows}


def test_heat_map(open_report, tmp_path, llama):
    rows = make_rows("alpaca", 6)
    scores = miwv_fast.score(rows, llama, embedder=text_embedder)
    scores.report(tmp_path / "r.html", model=llama)
    browser = open_report(tmp_path / "r.html")
    best = int(scores.rank()[0])
    browser.execute_script(f"showRecord({best})")
    heat = browser.find_element(By.CSS_SELECTOR, ".heat")
    assert heat.get_attribute("textContent") == rows[best]["output"]
    spans = heat.find_elements(By.TAG_NAME, "span")
    assert len(spans) == scores.table["response_tokens"][best].as_py()
    assert {span.get_attribute("class") for span in spans} <= {"hurts", "helps"}
    assert "nats: one-shot" in spans[0].get_attribute("title")
