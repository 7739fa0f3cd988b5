"""Pages open in a browser, from a file and without network, without errors; mouse, touch, keyboard and sound work."""

import pathlib
import shutil
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests import fake_pages

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)
KINDS = {
    "run": fake_pages.run_page, "suite": fake_pages.suite_page, "sounds": fake_pages.sound_page,
    "moments": fake_pages.moments_page,
}  # fmt: skip
DRAWN = [kind for kind in KINDS if kind != "moments"]  # pages with figures
WAIT_S = 20


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, pathlib.Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "mute-audio",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def open_page(browser, path: pathlib.Path, width_px: int = 1280) -> None:
    """Opens a page from its file in a window of this width; below 500 px as a phone shows it."""
    size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width_px < 500})
    browser.get_log("browser")
    browser.get(path.as_uri())


def wait_for(browser, script: str):
    """Waits until a JavaScript expression is true, and returns its value."""
    return WebDriverWait(browser, WAIT_S).until(lambda driver: driver.execute_script(f"return {script}"))


def column(browser, table: int, place: int) -> list[str]:
    """Returns the texts of a table's column, from top to bottom."""
    rows = f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows]"
    return browser.execute_script(f"return {rows}.map(row => row.cells[{place}].innerText)")


def tab_to(browser, wanted: str) -> list[str]:
    """Presses Tab until the element `wanted` has the focus; returns the elements that had it, in order."""
    script = (
        "const e = document.activeElement;"
        "return e.id || e.getAttribute('href') || (e.closest('th') ? 'header' : e.getAttribute('role') || e.tagName)"
    )
    reached = []
    for _ in range(30):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.execute_script(script))
        if reached[-1] == wanted:
            return reached
    raise AssertionError(f"{wanted} is not among {reached}")


@pytest.mark.parametrize("width_px", [1280, 390])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_without_an_error_and_is_no_wider_than_the_window(browser, paths, kind, width_px):
    open_page(browser, paths[kind], width_px)
    if kind in DRAWN:
        drawn = wait_for(
            browser, "[...document.querySelectorAll('[data-figure]')].map(e => e.querySelectorAll('.trace, .hm').length)"
        )
        assert len(drawn) >= 3
        assert min(drawn) >= 1
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1]
    assert widths[1] > width_px - 30
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_are_seen_as_texts_and_run_nowhere(browser, paths, kind):
    open_page(browser, paths[kind])
    seen = browser.execute_script("return document.body.innerText + document.body.textContent")
    assert "<script>alert(1)</script>" in seen
    assert browser.execute_script("return document.querySelectorAll('b, img[onerror], [data-figure] a').length") == 0
    if kind in DRAWN:
        wait_for(browser, "document.querySelectorAll('.main-svg').length > 0")
    assert browser.get_log("browser") == []  # it would show a script that the page's policy blocks


def test_a_hostile_caption_is_text_over_a_point_of_the_map(browser, paths):
    open_page(browser, paths["run"])
    browser.execute_script(
        "const map = document.querySelector('[data-figure=map]'); map.scrollIntoView();"
        "Plotly.Fx.hover(map, [{curveNumber: 0, pointNumber: 0}])"
    )
    shown = wait_for(browser, "document.querySelector('[data-figure=map] .hoverlayer')?.textContent")
    assert "<script>alert(1)</script>" in shown


def test_a_click_on_a_header_sorts_and_a_second_one_reverses_the_order(browser, paths):
    open_page(browser, paths["run"])
    before = column(browser, 0, 2)
    header = browser.find_elements(By.CSS_SELECTOR, "table thead button")[2]
    header.click()
    falling = column(browser, 0, 2)
    assert falling == sorted(before, reverse=True) != before
    cell = header.find_element(By.XPATH, "..")
    assert cell.get_attribute("aria-sort") == "descending"
    header.click()
    assert column(browser, 0, 2) == sorted(before)
    assert cell.get_attribute("aria-sort") == "ascending"


def test_numbers_sort_as_numbers(browser, paths):
    open_page(browser, paths["run"])
    cells = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[2])"
    browser.execute_script(f"{cells}.forEach((cell, i) => cell.dataset.sort = [9, -2, 10, '', 1e-5, -30][i])")
    browser.find_elements(By.CSS_SELECTOR, "table thead button")[2].click()
    assert browser.execute_script(f"return {cells}.map(cell => cell.dataset.sort)") == [
        "10",
        "9",
        "0.00001",
        "-2",
        "-30",
        "",
    ]


def test_enter_on_a_header_sorts_words_by_letters_and_what_is_missing_stays_last(browser, paths):
    open_page(browser, paths["run"])
    headers = browser.find_elements(By.CSS_SELECTOR, "table:not(#none) thead button")
    paper = next(button for button in headers if button.text.startswith("AV ROC"))
    table = 2
    for _ in range(2):
        paper.send_keys(Keys.ENTER)
        shown = column(browser, table, 1)
        assert shown[-1] == "–"
        assert len(shown) == 9
    next(button for button in headers if button.text.startswith("method")).send_keys(Keys.SPACE)
    names = column(browser, table, 0)
    assert names == sorted(names, key=str.lower)
    assert len(browser.find_elements(By.CSS_SELECTOR, "[aria-sort]")) == 1


@pytest.mark.parametrize("kind", ["run", "sounds", "moments"])
def test_a_clip_plays(browser, paths, kind):
    open_page(browser, paths[kind])
    player = browser.find_element(By.CSS_SELECTOR, "audio[data-clip]")
    assert kind == "moments" or not player.get_attribute("src")  # only near the screen
    browser.execute_script("arguments[0].scrollIntoView()", player)
    wait_for(browser, "document.querySelector('audio[data-clip]').readyState >= 1")
    player.send_keys(Keys.SPACE)  # the player's own controls, as a user would
    if browser.execute_script("return arguments[0].paused", player):
        browser.execute_async_script("arguments[0].muted = true; arguments[0].play().then(arguments[1])", player)
    played = wait_for(browser, "document.querySelector('audio[data-clip]').currentTime")
    assert played > 0
    assert 1.4 < browser.execute_script("return arguments[0].duration", player) < 1.8


def test_images_are_loaded_when_they_are_near_the_screen(browser, paths):
    open_page(browser, paths["run"])
    last = "[...document.querySelectorAll('img[data-clip]')].at(-1)"
    assert not browser.execute_script(f"return {last}.src")
    browser.execute_script(f"{last}.scrollIntoView()")
    assert wait_for(browser, f"{last}.naturalWidth") == 96


def test_the_keyboard_alone_reaches_headers_and_goes_through_the_map(browser, paths):
    open_page(browser, paths["run"])
    reached = tab_to(browser, "header")
    open_page(browser, paths["run"])
    tab_to(browser, "#map")
    browser.switch_to.active_element.send_keys(Keys.ENTER)  # the page's own list of sections
    reached += tab_to(browser, "map-next")
    assert {"#discovery", "region", "header", "map-tower", "map-previous"} <= set(reached)
    captions = []
    for _ in range(2):
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        captions.append(browser.find_element(By.CSS_SELECTOR, "[data-part=narration]").text)
    assert captions[0] != captions[1]
    assert all(caption.startswith("#C C says </script>") for caption in captions)
    assert "clip 2 of 60" in browser.find_element(By.ID, "map-clip").text
    assert wait_for(browser, "document.querySelector('[data-part=picture]').naturalWidth") == 96
    assert wait_for(browser, "document.querySelector('[data-part=sound]').readyState >= 1")


def test_a_click_on_the_map_selects_and_the_map_of_sounds_keeps_it(browser, paths):
    open_page(browser, paths["run"])
    ring = "document.querySelector('[data-figure=map]').data.at(-1)"
    browser.execute_script(
        "document.querySelector('[data-figure=map]').emit('plotly_click', {points: [{customdata: 7}]})"
    )
    assert "clip 8 of 60" in browser.find_element(By.ID, "map-clip").text
    places = [browser.execute_script(f"return [{ring}.x[0], {ring}.y[0]]")]
    browser.execute_script(
        "const tower = document.getElementById('map-tower'); tower.value = 'audio'; tower.dispatchEvent(new Event('change'))"
    )
    places.append(browser.execute_script(f"return [{ring}.x[0], {ring}.y[0]]"))
    expected = browser.execute_script(
        "const {places} = JSON.parse(document.getElementById('map-clips').textContent);"
        "return [places.video[7], places.audio[7]]"
    )
    assert places == expected
    assert places[0] != places[1]
    moved = browser.execute_script(
        "const map = document.querySelector('[data-figure=map]'); const at = [...map.data[0].customdata].indexOf(7);"
        "const trace = map.data[at < 0 ? 1 : 0]; const i = [...trace.customdata].indexOf(7); return [trace.x[i], trace.y[i]]"
    )
    assert moved == expected[1]


@pytest.mark.parametrize("kind", KINDS)
def test_elements_that_are_touched_are_large_enough(browser, paths, kind):
    open_page(browser, paths[kind], 390)
    time.sleep(0.2)  # until plots have their width
    script = (
        "return [...document.querySelectorAll('a, button, select, summary, audio')].filter(e => e.offsetParent)"
        ".map(e => e.getBoundingClientRect().height)"
    )
    heights = browser.execute_script(script)
    assert len(heights) > 10
    assert min(heights) >= 40
