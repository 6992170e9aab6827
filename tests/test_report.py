import base64
import json
import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import pages
import pytest
from pages import prediction, row
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_results import publish, stage, table

from helpers import pipeline
from helpers.cli import main
from helpers.config import load_config
from helpers.errors import RunError
from helpers.images import rle
from helpers.pipeline import survey
from helpers.pipeline.report import PAGE, make_report
from helpers.pipeline.results import ResultStore
from helpers.storage import open_storage
from helpers.tracking import page as page_module

HOSTILE = "<img src=x onerror=window.hacked=1>.jpg"
HOSTILE_ERROR = "the image is <!--<script></script ><script>window.hacked=2</script>\u2028 damaged"
SIZE = 320, 240
MASK = np.zeros(SIZE[::-1], bool)
cv2.ellipse(MASK_PIXELS := MASK.astype(np.uint8), (200, 90), (70, 40), 25, 0, 360, 1, -1)
MASK = MASK_PIXELS.astype(bool)
MASK[70:90, 180:210] = False  # a hole
BOX = (120.0, 40.0, 280.0, 140.0)


def photographs(folder: Path) -> list[dict]:
    """30 images with a cat, one each with a mask, a hostile name, a bird and keypoints, and one that failed."""
    rows = []
    for number in range(30):
        path = pages.write_image(folder / f"cat {number:02d}.jpg", SIZE)
        found = [prediction(0, 0.4 + number / 100, (10, 10, 60 + number, 90)), prediction(1, 0.1, (0, 0, 30, 60))]
        rows.append(row(path, SIZE, found))
    rows.append(row(pages.write_image(folder / "mask.png", SIZE), SIZE, [prediction(1, 0.95, BOX, MASK)]))
    rows.append(row(pages.write_image(folder / HOSTILE, SIZE), SIZE, [prediction(3, 0.9, (5, 5, 99, 99))]))
    points = [(30, 40, 0.9), (50, 60, 0.1)]
    rows.append(
        row(pages.write_image(folder / "bird.jpg", SIZE), SIZE, [prediction(2, 0.8, (20, 20, 90, 90), None, points)])
    )
    (folder / "bad.jpg").write_bytes(b"no image")
    rows.append(row(folder / "bad.jpg", None, None, HOSTILE_ERROR))
    return rows


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return pages.write_output(folder / "output", photographs(folder / "photographs"), str(folder / "photographs"))


@pytest.fixture(scope="module")
def page(output) -> Path:
    return report(output)


@pytest.fixture(scope="module")
def browser():
    why = pages.missing()
    if why and not (os.environ.get("CI") or os.environ.get("REQUIRE_CHROMIUM")):
        pytest.skip(why)
    assert not why, why
    with pages.start_browser() as browser:
        yield browser


@pytest.fixture
def shown(browser, page):
    return opened(browser, page)


def report(output: Path, against: Path | None = None, **settings) -> Path:
    config = load_config("local", **settings)
    other = against and ResultStore(open_storage(str(against)))
    return Path(make_report(ResultStore(open_storage(str(output))), config, other))


def data_of(page: Path) -> dict:
    """What the page's program is told."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def opened(browser, page: Path, **emulated):
    """The page, with all that it draws at first."""
    size = {"width": 1360, "height": 900, "deviceScaleFactor": 1, "mobile": False} | emulated.get("screen", {})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": emulated.get("scheme", "light")}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait(browser, lambda: browser.execute_script("return document.body.dataset.charts"))
    return browser


def wait(browser, condition):
    return WebDriverWait(browser, 20).until(lambda _: condition())


def control(browser, name: str):
    return browser.find_element(By.ID, name)


def names(browser) -> list[str]:
    """The names of the images on the page of the gallery."""
    return browser.execute_script("return [...document.querySelectorAll('.card .name')].map(e => e.textContent)")


def choose(browser, name: str, text: str) -> None:
    Select(control(browser, name)).select_by_visible_text(text)


def enter(browser, name: str, text: str) -> None:
    control(browser, name).clear()
    control(browser, name).send_keys(text)


def pixels(browser, selector: str) -> np.ndarray:
    """A canvas as uint8 `[height, width, 3]`, BGR, once it is drawn."""
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, f"{selector}[data-drawn]"))
    uri = browser.execute_script("return document.querySelector(arguments[0]).toDataURL()", selector)
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)


def test_the_page_tells_what_is_in_the_table(shown):
    tiles = dict(reversed(tile.text.split("\n")) for tile in shown.find_elements(By.CLASS_NAME, "tile"))
    assert [tiles[name] for name in ("images", "failed", "predictions")] == ["34", "1", "63"]
    assert shown.title == "output" and "20260102T030405-0badcafe" in shown.find_element(By.ID, "run").text
    assert control(shown, "count").text == "34 of 34 images" and len(names(shown)) == 24
    assert names(shown)[0] == "cat 00.jpg"  # the least certain
    assert len(shown.find_elements(By.CSS_SELECTOR, "#task-chart .mark-rect path")) == 2
    assert not [line for line in shown.get_log("browser") if line["level"] == "SEVERE"]


def test_filters_by_class_score_error_and_path_change_what_is_shown(shown):
    choose(shown, "class", "bird")
    assert names(shown) == ["bird.jpg"]
    shown.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    enter(shown, "min-score", "0.85")
    assert set(names(shown)) == {"mask.png", HOSTILE}
    shown.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    choose(shown, "show", "errors")
    assert names(shown) == ["bad.jpg"]
    choose(shown, "show", "all")
    enter(shown, "search", "CAT 1")
    assert names(shown) == [f"cat {number}.jpg" for number in range(10, 20)]
    choose(shown, "order", "most certain")
    assert names(shown)[0] == "cat 19.jpg"


def test_a_click_on_the_chart_of_classes_filters_and_a_second_one_ends_that(shown):
    bar = "#class-chart path[aria-label*='class: bird']"
    for expected in (["bird.jpg"], None):
        before = shown.execute_script("return document.body.dataset.charts")
        ActionChains(shown).click(shown.find_element(By.CSS_SELECTOR, bar)).perform()
        wait(shown, lambda: shown.execute_script("return document.body.dataset.charts") != before)  # noqa: B023
        assert names(shown) == expected if expected else len(names(shown)) == 24


def test_a_drag_over_the_chart_of_scores_filters(shown):
    bars = shown.find_elements(By.CSS_SELECTOR, "#score-chart path[aria-label]")
    assert len(bars) == 20
    actions = ActionChains(shown)
    actions.move_to_element(bars[16]).click_and_hold().move_to_element(bars[19]).release().perform()
    wait(shown, lambda: float(control(shown, "min-score").get_attribute("value")) > 0.3)
    low, high = (float(control(shown, name).get_attribute("value")) for name in ("min-score", "max-score"))
    assert low == pytest.approx(0.825, abs=0.03) and high == pytest.approx(0.975, abs=0.03)
    assert HOSTILE in names(shown) and not [name for name in names(shown) if name.startswith("cat")]


def test_a_mask_lies_where_the_results_say(shown):
    enter(shown, "search", "mask.png")
    shown.find_element(By.CLASS_NAME, "card").click()
    drawn = pixels(shown, "#detail canvas")
    scale = drawn.shape[1] / SIZE[0]
    assert scale > 2
    tinted = np.ptp(drawn.astype(int), axis=2) > 40
    expected = cv2.resize(MASK.astype(np.uint8), tinted.shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    x1, y1, x2, y2 = (round(side * scale) for side in BOX)
    inside = np.zeros_like(tinted)
    inside[y1 + 12 : y2 - 12, x1 + 12 : x2 - 12] = True  # the box's line and its caption are not the mask's
    union = (tinted | expected) & inside
    assert (tinted & expected & inside).sum() / union.sum() > 0.98
    assert not tinted[: y1 - 60].any() and not tinted[y2 + 12 :].any()


def test_boxes_and_keypoints_lie_where_the_results_say(shown):
    enter(shown, "search", "bird.jpg")
    shown.find_element(By.CLASS_NAME, "card").click()
    drawn = pixels(shown, "#detail canvas")
    scale = drawn.shape[1] / SIZE[0]
    colored = np.ptp(drawn.astype(int), axis=2) > 60

    def at(x: float, y: float) -> bool:
        return bool(colored[round(y * scale), round(x * scale)])

    assert at(20, 55) and at(90, 55) and at(55, 90)  # the box's sides
    assert at(30, 40) and not at(50, 60) and not at(70, 70)  # a point that is probable, one that is not, and none


def test_captions_do_not_cover_each_other(shown):
    shown.execute_script(
        """
        const fill = CanvasRenderingContext2D.prototype.fillRect;
        CanvasRenderingContext2D.prototype.fillRect = function (...sides) {
          window.filled.push(sides);
          fill.apply(this, sides);
        };
        window.filled = [];
        """
    )
    enter(shown, "min-score", "0")
    enter(shown, "search", "cat 00")
    shown.execute_script("window.filled = []; document.querySelector('.card').click()")
    pixels(shown, "#detail canvas")
    (x, y, width, height), (other_x, other_y, *_) = shown.execute_script("return window.filled")
    assert abs(other_x - x) < width and abs(other_y - y) >= height  # the dog's would be in the cat's place


def test_a_hostile_name_label_or_error_is_text(shown):
    assert (
        HOSTILE
        in shown.execute_script("return JSON.parse(document.getElementById('data').textContent)")["sample"][
            "items"
        ].__str__()
    )
    enter(shown, "search", "onerror")
    assert names(shown) == [HOSTILE]
    shown.find_element(By.CLASS_NAME, "card").click()
    assert HOSTILE in control(shown, "path").text
    assert "<b>bus</b>" in control(shown, "views").text
    bar = shown.find_element(By.CSS_SELECTOR, "#class-chart path[aria-label*='bus']")
    shown.execute_script("document.getElementById('detail').close(); arguments[0].scrollIntoView()", bar)
    ActionChains(shown).move_to_element(bar).perform()  # the chart tells the label beside the pointer
    wait(
        shown,
        lambda: "bus" in shown.execute_script("return document.getElementById('vg-tooltip-element')?.innerText ?? ''"),
    )
    assert HOSTILE_ERROR.partition("\u2028")[0] in control(shown, "error-table").text
    found = (
        "return [document.querySelectorAll('img, b > b, #cards b, #error-table script').length, window.hacked ?? null]"
    )
    assert shown.execute_script(found) == [0, None]


def test_the_page_asks_nobody_for_anything_and_runs_no_other_program(shown, page):
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    shown.execute_async_script(
        """
        const [address, done] = arguments;
        const image = new Image();
        const script = document.createElement("script");
        script.textContent = "window.hacked = 3";
        document.body.append(script);
        const button = document.createElement("button");
        button.setAttribute("onclick", "window.hacked = 4");
        button.click();
        image.onload = image.onerror = () => fetch(address + "/fetch").catch(() => 0).then(done);
        image.src = address + "/image";
        """,
        address,
    )
    server.shutdown()
    assert not asked and shown.execute_script("return window.hacked ?? null") is None
    messages = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert [url for url in urls if url != page.as_uri() and not url.startswith(("data:", address))] == []


def test_arrow_keys_turn_pages_and_images(shown):
    body = shown.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    assert control(shown, "page").text == "2 / 2" and len(names(shown)) == 10
    body.send_keys(Keys.ARROW_LEFT)
    shown.find_element(By.CLASS_NAME, "card").click()
    position = shown.find_element(By.ID, "position")
    assert position.text == "1 / 34"
    ActionChains(shown).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert position.text == "3 / 34"
    ActionChains(shown).send_keys(Keys.ARROW_LEFT).perform()
    assert position.text == "2 / 34" and "cat 01" in control(shown, "path").text
    ActionChains(shown).send_keys(Keys.ESCAPE).perform()
    wait(shown, lambda: not control(shown, "detail").is_displayed())
    assert shown.execute_script("return document.activeElement.innerText").startswith("cat 01.jpg")
    control(shown, "search").send_keys(Keys.ARROW_RIGHT)  # which is the field's own there
    assert control(shown, "page").text == "1 / 2"


def test_the_page_fits_a_phone(browser, page):
    shown = opened(browser, page, screen={"width": 390, "height": 844, "mobile": True})
    sizes = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert shown.execute_script(sizes) == [390, 390]
    first, second = shown.find_elements(By.CLASS_NAME, "card")[:2]
    assert first.rect["y"] == second.rect["y"] and first.rect["width"] > 150
    shown.execute_script("arguments[0].click()", first)
    pixels(shown, "#detail canvas")
    assert control(shown, "detail").rect["width"] == 390
    assert shown.execute_script(sizes) == [390, 390]


def test_a_phone_scrolls_to_both_sides_of_a_comparison(browser, compared):
    shown = opened(browser, compared, screen={"width": 390, "height": 500, "mobile": True})
    shown.execute_script("document.querySelector('.card').click()")
    pixels(shown, ".view:last-child canvas")
    origin = ScrollOrigin.from_element(control(shown, "path"), 0, 150)
    ActionChains(shown).scroll_from_origin(origin, 0, 2000).perform()
    place = "return document.querySelector('.view:last-child canvas').getBoundingClientRect().bottom"
    wait(shown, lambda: shown.execute_script(place) <= 500)


def test_the_page_is_dark_where_the_reader_has_it_dark(browser, page):
    colors = """
        const mean = (color) => {
          const probe = document.createElement("i");
          probe.style.color = color;
          document.body.append(probe);
          return getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3;
        };
        const [style, label] = [getComputedStyle(document.body), document.querySelector("#class-chart text")];
        return [style.backgroundColor, style.color, label.getAttribute("fill")].map(mean)"""
    for scheme in ("light", "dark"):
        back, text, label = opened(browser, page, scheme=scheme).execute_script(colors)
        assert (back > 200 > 100 > text) if scheme == "light" else (back < 50 < 200 < text)
        assert abs(label - back) > 100


def test_without_the_library_of_charts_there_are_tables(browser, output, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    page_module.charts.cache_clear()
    try:
        page = report(output)
    finally:
        page_module.charts.cache_clear()
    assert "vl-convert-python" in caplog.text
    shown = opened(browser, page)
    rows = [row.text for row in shown.find_elements(By.CSS_SELECTOR, "#class-chart tbody tr")]
    assert any(row.startswith("cat ") and row.endswith(" 30") for row in rows)
    choose(shown, "class", "bird")
    assert names(shown) == ["bird.jpg"]


def test_the_library_of_charts_is_made_once_for_all_processes(tmp_path, monkeypatch):
    import vl_convert

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    made = page_module.charts.__wrapped__()
    assert made.startswith("/* Vega") and "window.vegaEmbed" in made
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *_: pytest.fail("made again"))
    assert page_module.charts.__wrapped__() == made
    (kept,) = folder.rglob("*.js")
    kept.unlink()
    with pytest.raises(pytest.fail.Exception):
        page_module.charts.__wrapped__()


@pytest.fixture(scope="module")
def compared(output, tmp_path_factory) -> Path:
    """The output against another one: of one image it finds a dog more, of one another place, of one nothing."""
    folder = tmp_path_factory.mktemp("compared")
    photographs = output.parent / "photographs"
    rows = []
    for number in range(30):
        box = (10, 10, 60 + number, 90)
        found = [prediction(0, 0.6, box)]
        if number == 3:
            found.append(prediction(1, 0.7, (100, 100, 200, 200)))
        elif number == 5:
            found = [prediction(0, 0.6, (150, 10, 300, 90))]
        elif number == 7:
            found = []
        rows.append(row(photographs / f"cat {number:02d}.jpg", SIZE, found, model="yolact-int8@ba9876543210"))
    other = pages.write_output(folder / "other", rows, str(photographs))
    mine = folder / "mine"
    mine.mkdir()
    for name in ("results", "runs"):
        (mine / name).symlink_to(output / name)
    return report(mine, other)


def test_against_another_output_the_page_shows_what_one_finds_and_the_other_does_not(browser, compared):
    shown = opened(browser, compared)
    choose(shown, "show", "what differs")
    enter(shown, "search", "cat")
    assert set(names(shown)) == {f"cat {number:02d}.jpg" for number in (3, 5, 7)}
    assert control(shown, "count").text == "3 of 34 images · only left: 2 · only right: 2"
    enter(shown, "search", "cat 03")
    assert shown.find_element(By.CLASS_NAME, "alone").text == "only left: 0 · only right: 1"
    shown.find_element(By.CLASS_NAME, "card").click()
    views = shown.find_elements(By.CLASS_NAME, "view")
    assert ["only here" in view.text for view in views] == [False, True]
    assert all(model in view.text for model, view in zip(("yolact-fp32", "yolact-int8"), views, strict=True))


def test_a_comparison_counts_the_images_with_other_classes(compared):
    data = data_of(compared)
    tiles = {name: value for name, value, *_ in data["tiles"]}
    assert tiles["images in both"] == 30 and tiles["of these with other classes"] == 2  # 3 and 7; 5 has the same class
    assert data["pair"] == [0, 1]
    missing = next(item for item in data["sample"]["items"] if item["path"].endswith("mask.png"))
    assert missing["rows"][1] is None and missing["rows"][0]


# ------------------------------------------------------------ what the page is told


def test_thumbnails_are_upright_and_only_as_large_as_the_sample_allows(tmp_path):
    plain = cv2.imencode(".jpg", np.full((900, 1600, 3), 90, np.uint8))[1].tobytes()
    turned = (
        plain[:2]
        + b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        + plain[2:]
    )
    path = tmp_path / "photographs" / "turned.jpg"
    path.parent.mkdir()
    path.write_bytes(turned)
    output = pages.write_output(tmp_path / "output", [row(path, (900, 1600), [])], str(path.parent))
    (item,) = data_of(report(output))["sample"]["items"]
    content = base64.b64decode(item["thumbnail"].partition(",")[2])
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (960, 540, 3)


def test_an_image_that_cannot_be_read_any_more_costs_its_thumbnail_only(tmp_path):
    folder = tmp_path / "photographs"
    rows = [row(pages.write_image(folder / f"{name}.png", SIZE), SIZE, []) for name in ("gone", "other", "same")]
    rows.append(row("/elsewhere/x.png", SIZE, []))
    output = pages.write_output(tmp_path / "output", rows, str(folder))
    (folder / "gone.png").unlink()
    pages.write_image(folder / "other.png", (10, 10))
    items = {Path(item["path"]).stem: item for item in data_of(report(output))["sample"]["items"]}
    assert items["same"]["thumbnail"] and not items["same"]["missing"]
    assert "gone" in items["gone"]["missing"] and "320 x 240" in items["other"]["missing"]
    assert "no recorded run" in items["x"]["missing"]


def test_thumbnails_that_take_too_long_are_left_out(output, monkeypatch):
    monkeypatch.setattr("helpers.pipeline.report.READING_SECONDS", 0)
    items = data_of(report(output))["sample"]["items"]
    assert all(item["thumbnail"] is None for item in items)
    assert sum("took too long" in (item["missing"] or "") for item in items) == 33


def test_a_run_that_has_not_ended_has_the_seconds_that_it_has_taken(tmp_path):
    rows = [row("/p/x.jpg", SIZE, [])]
    nulls = {"seconds": None, "publish_seconds": None, "log_seconds": None, "open_seconds": 2.0}
    tiles = dict(data_of(report(pages.write_output(tmp_path / "output", rows, "/p", **nulls)))["tiles"][3:])
    assert tiles == {"images per second": pytest.approx(1 / 6), "seconds": 9}


def test_no_secret_is_on_the_page(tmp_path):
    secret = "sv=2026&sig=c2VjcmV0LXNpZ25hdHVyZS1vZi1hLXNhcw%3D%3D"
    rows = [row(f"abfss://c@a.dfs.core.windows.net/x/1.jpg?{secret}", None, None, f"the file is gone: ?{secret}")]
    output = pages.write_output(tmp_path / "output", rows, f"https://a.blob.core.windows.net/c?{secret}")
    text = report(output).read_text()
    assert "c2VjcmV0" not in text and "the file is gone" in text


def many(tmp_path: Path, count: int, **other) -> Path:
    """Rows of which almost all are of one class; one in a thousand is another's, one in a hundred failed."""
    rows = []
    for number in range(count):
        rare, failed = number % 1000 == 17, number % 100 == 3
        found = None if failed else [prediction(2 if rare else 0, 0.35 + number % 60 / 100, (1, 1, 9, 9))]
        rows.append(
            row(f"/photographs/{number}.jpg", SIZE, found, "the file is empty; 0 bytes" if failed else None, **other)
        )
    return pages.write_output(tmp_path / "many", rows, "/photographs", files=5)


def test_the_whole_table_is_counted_and_the_sample_has_every_class_and_error(tmp_path):
    data = data_of(report(many(tmp_path, 4000), report=50))
    (side,) = data["sides"]
    counts = {data["classes"][number]: sum(counts) for number, counts in side["counts"]}
    assert counts == {"cat": 4000 - 40 - 4, "bird": 4}
    assert data["errors"] == [
        {"side": 0, "reason": "the file is empty", "count": 40, "examples": data["errors"][0]["examples"]}
    ]
    assert len(data["errors"][0]["examples"]) == survey.EXAMPLES
    items = data["sample"]["items"]
    assert len(items) == 50
    shown = Counter(
        data["classes"][item["rows"][0]["predictions"][0][0]] if item["rows"][0]["predictions"] else "error"
        for item in items
    )
    assert shown["error"] == 10 and shown["bird"] == 4
    scores = [item["rows"][0]["predictions"][0][1] for item in items if item["rows"][0]["predictions"]]
    assert min(scores) < 0.5 and max(scores) > 0.75


def test_of_a_long_table_few_rows_are_held_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "HELD_ROWS", 300)
    store = ResultStore(open_storage(str(many(tmp_path, 2000))))
    outputs = [(store.storage, store.files())]
    surveyed = survey.Survey(outputs)
    assert sum(map(len, surveyed._held)) <= 300
    assert surveyed.sides[0].images == 2000 and surveyed.sides[0].predictions == 1980
    chosen = surveyed.choose(100)
    assert chosen["hash"].nunique() == 100
    monkeypatch.undo()
    everything = survey.Survey(outputs)
    assert len(everything.choose(100)) == 100


def test_the_page_of_a_run_counts_the_newest_rows_of_a_long_table_and_says_so(tmp_path):
    storage = open_storage(str(tmp_path))
    store = ResultStore(storage)
    for day, names in enumerate((["/a.jpg", "/b.jpg"], ["/c.jpg"], ["/d.jpg"])):
        publish(store, stage(store, f"2026010{day + 1}T000000-0000000{day}", 0, table(*names)))
    for most, images, start in (
        (1, 1, "The newest 1 "),
        (2, 2, "The newest 2 "),
        (3, 4, "All 4 "),
        (None, 4, "All 4 "),
    ):
        make_report(store, load_config("local"), most_rows=most)
        data = data_of(tmp_path / "report" / "index.html")
        assert data["sample"]["total"] == images and data["counted"].startswith(start), most


def test_a_sample_is_of_few_archives_and_videos_because_each_is_read_whole(tmp_path):
    rows = [row(f"/shards/{number % 100}.tar#member={number}.jpg", SIZE, []) for number in range(1000)]
    rows += [row(f"/shards/{number}.jpg", SIZE, []) for number in range(5)]
    output = pages.write_output(tmp_path / "output", rows, "/shards")
    items = data_of(report(output))["sample"]["items"]
    assert len({item["path"].partition("#")[0] for item in items if "#" in item["path"]}) == survey.CONTAINERS
    assert sum("#" not in item["path"] for item in items) == 5


def test_large_masks_are_made_smaller_or_left_out_and_the_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.pipeline.report.PREDICTION_BYTES", 60_000)
    folder, size = tmp_path / "photographs", (1600, 1200)
    round_mask = cv2.ellipse(np.zeros((1200, 1600), np.uint8), (800, 600), (700, 500), 0, 0, 360, 1, -1)
    noise = np.random.default_rng(0).random((1200, 1600)) > 0.5
    found = [prediction(0, 0.9, (100, 100, 1500, 1100), round_mask), prediction(0, 0.8, (0, 0, 1600, 1200), noise)]
    assert len(found[0]["mask"]["counts"]) > 2_000 and len(found[1]["mask"]["counts"]) > 500_000
    rows = [row(pages.write_image(folder / f"{number}.jpg", size), size, found) for number in range(30)]
    page = report(pages.write_output(tmp_path / "output", rows, str(folder)))
    assert page.stat().st_size < 10_000_000
    for item in data_of(page)["sample"]["items"]:
        (first, second), left_out = item["rows"][0]["predictions"], item["rows"][0]["left_out"]
        assert second[3] is None and left_out == 1
        small = rle.decode(first[3])
        expected = cv2.resize(round_mask, small.shape[::-1], interpolation=cv2.INTER_NEAREST)
        assert small.shape == (168, 224) and np.mean(small == expected) > 0.99


def test_a_page_of_as_many_images_and_predictions_as_there_may_be_stays_small(tmp_path):
    folder, noise = tmp_path / "photographs", np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    content, points = cv2.imencode(".jpg", noise)[1].tobytes(), [(100.25, 200.75, 0.53)] * 17
    found = [prediction(0, 0.9, (123.4, 123.4, 223.4, 323.4), None, points)] * 100
    folder.mkdir()
    rows = []
    for number in range(220):
        path = folder / f"{number}.jpg"
        path.write_bytes(content)
        rows.append(row(path, (640, 480), found))
    page = report(pages.write_output(tmp_path / "output", rows, str(folder)))
    assert page.stat().st_size < 10_000_000
    items = data_of(page)["sample"]["items"]
    assert len(items) == 200 and all(item["thumbnail"] for item in items)
    assert all(0 < len(item["rows"][0]["predictions"]) == 100 - item["rows"][0]["left_out"] for item in items)


def test_the_command_writes_the_page_and_says_where(output, tmp_path, capsys):
    assert main(["report", str(output)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": str(output / PAGE)}
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["report", str(output), "--against", str(tmp_path)]) == 2


def test_an_output_without_results_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run has results"):
        report(pages.write_output(tmp_path / "output", [], "/x"))


def test_a_run_leaves_the_page_and_a_page_that_fails_is_a_warning(
    spark, samples, bundle_uri, tmp_path, caplog, monkeypatch
):
    config = load_config("local", **{"spark.master": "local[2]", "pictures": 0})
    pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), config)
    data = data_of(tmp_path / "out" / PAGE)
    assert data["tiles"][0] == ["images", 64] and len(data["errors"]) == 3
    assert sum(bool(item["thumbnail"]) for item in data["sample"]["items"]) == 60
    monkeypatch.setattr("helpers.pipeline.report.render", lambda data: 1 / 0)
    pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "other"), config)
    assert "the run has no page" in caplog.text and not (tmp_path / "other" / PAGE).exists()
    off = load_config("local", **{"spark.master": "local[2]", "pictures": 0, "report": 0})
    caplog.clear()
    pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "none"), off)
    assert "no page" not in caplog.text and not (tmp_path / "none" / PAGE).exists()
