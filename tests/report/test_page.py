"""Pages in a real browser: charts are drawn, lists and tables work, and nothing is asked of a network."""

import base64
import json
import shutil
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from lexibit import LexibitConfig, checkpoint, report
from lexibit.files import write_json
from lexibit.report.study import render_study

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ABOUT = {"name": "GLUE in few bits", "about": "What is left.", "published": "By others."}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if DRIVER is None or CHROMIUM is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browse(driver, tmp_path):
    """A function that opens a page, waits until all is drawn, and sees that it is clean."""

    def opened(page, width=1200, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(page, encoding="utf-8")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get_log("performance")
        driver.get(file.as_uri())
        WebDriverWait(driver, 60).until(lambda _: root(driver).get_dom_attribute("data-drawn"))
        return driver

    yield opened
    log = driver.get_log("browser")
    assert not log, [line["message"] for line in log]
    sent = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file://", "data:")) for url in asked), asked


def root(driver):
    return driver.find_element(By.TAG_NAME, "html")


def marks(driver, chart, mark="path"):
    """The marks of a chart, axes and legends left out."""
    return driver.find_elements(By.CSS_SELECTOR, f"#{chart} .mark-{mark}.role-mark :is(path, line)")


def table(driver, name):
    """A table, opened."""
    details = driver.find_element(By.CSS_SELECTOR, f'details[data-table="{name}"]')
    if details.get_dom_attribute("open") is None:
        details.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(driver, 10).until(lambda _: details.find_elements(By.TAG_NAME, "table"))
    return details


def rows(details):
    script = (
        "return [...arguments[0].querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return details.parent.execute_script(script, details)


def labelled(driver, label):
    """A list to pick from, by its label, among those that are seen."""
    return next(
        Select(one.find_element(By.TAG_NAME, "select"))
        for one in driver.find_elements(By.CSS_SELECTOR, ".picks label")
        if one.is_displayed() and one.text.startswith(label)
    )


def wide(driver):
    return driver.execute_script("return document.documentElement.scrollWidth")


@pytest.fixture
def model_page(float_folder, tmp_path):
    """A function that makes the page of a tiny quantized model: with its float model, or what is given."""

    def make(against=True, search=None, **settings):
        source, out = float_folder(), tmp_path / "packed"
        config = LexibitConfig(**({"scheme": "kmeans", "bits": 3, "groups": "row"} | settings))
        checkpoint.quantize_to(source, out, config, progress=False)
        return report.of_checkpoint(out, source if against else None, search)

    return make


@pytest.fixture
def study_page(study_results, described):
    return lambda **given: render_study(ABOUT, study_results(**given), lambda key: described())


# models ----------------------------------------------------------------------------------------------


def test_the_charts_of_a_model_are_drawn(browse, model_page):
    driver = browse(model_page(importance="E=1,C=0.999"))
    assert len(marks(driver, "chart-errors", "rect")) == 14  # six kinds in two layers, embeddings, pooler
    assert len(marks(driver, "chart-histogram", "rect")) == 60 + 8
    assert len(marks(driver, "chart-histogram", "rule")) == 8
    for column in ("bits", "E", "gap", "P"):
        assert len(marks(driver, f"chart-{column}", "rect")) == 4
    for chart in driver.find_elements(By.CLASS_NAME, "chart"):
        assert chart.get_dom_attribute("aria-label")
    text = root(driver).text
    assert "from_pretrained" in text
    assert "stored bits a weight" in text
    assert "No search is known of this model" in text


def test_another_weight_has_another_histogram(browse, model_page):
    driver = browse(model_page())
    before = [mark.get_dom_attribute("d") for mark in marks(driver, "chart-histogram", "rect")]
    numbers = rows(table(driver, "bins"))
    assert len(numbers) == 50  # of 60: the others are shown when they are asked for
    picked = labelled(driver, "Weight")
    picked.select_by_index(5)
    WebDriverWait(driver, 10).until(
        lambda _: before != [mark.get_dom_attribute("d") for mark in marks(driver, "chart-histogram", "rect")]
    )
    assert rows(table(driver, "bins")) != numbers
    table(driver, "bins").find_element(By.CLASS_NAME, "more").click()
    assert len(rows(table(driver, "bins"))) == 60
    assert len(rows(table(driver, "levels"))) == 8


def test_without_the_float_model_the_page_says_what_to_give(browse, model_page):
    driver = browse(model_page(against=False))
    text = root(driver).text
    assert text.count("give --against FLOAT_MODEL") == 2
    assert "No importance was given" in text
    assert not driver.find_element(By.ID, "chart-errors").is_displayed()
    assert not driver.find_element(By.ID, "chart-histogram").is_displayed()
    assert marks(driver, "chart-bits", "rect")


def test_a_search_has_a_history(browse, model_page, tmp_path):
    trials = [
        {
            "number": place,
            "parameters": {"E": 0.5, "1-C": 1e-6, "P": 0.1},
            "value": value,
            "seconds": 1.0,
            "fault": fault,
        }
        for place, (value, fault) in enumerate([(0.5, None), (None, "no memory"), (0.25, None), (0.75, None)])
    ]
    setting = {"importance": {"E": 0.5, "C": 0.999, "P": 0.1, "mask": False}, "bits": 2}
    search = {
        "objective": "loss", "mode": "model-wise", "budget": 3, "float": 0.1, "start": 0.5, "found": 0.25,
        "stages": {"each layer alone": trials, "all layers": trials}, "settings": {"embeddings": setting},
    }  # fmt: skip
    write_json(tmp_path / "plan.json", {"config": {"bits": 3}, "search": search})
    driver = browse(model_page(search=tmp_path / "plan.json"))
    assert len(marks(driver, "chart-history", "symbol")) == 3
    found = rows(table(driver, "trials"))
    assert [row[2] for row in found] == ["0.5", "\N{EN DASH}", "0.25", "0.75"]
    assert [row[3] for row in found] == ["0.5", "0.5", "0.25", "0.25"]
    text = root(driver).text
    assert "1 of 4 trials failed" in text
    assert "4 measurements of one layer alone" in text
    assert rows(table(driver, "layers")) == [["embeddings", "2", "0.5", "0.001", "0.1"]]


# studies ---------------------------------------------------------------------------------------------


def test_the_charts_of_a_study_are_drawn(browse, study_page):
    driver = browse(study_page())
    assert len(marks(driver, "chart-sizes", "symbol")) == 13
    assert len(marks(driver, "chart-sizes", "line")) == 1
    assert len(marks(driver, "chart-by-bits", "symbol")) == 12
    assert len(marks(driver, "chart-by-bits", "line")) == 4
    assert "No cell failed." in root(driver).text
    assert labelled(driver, "Cell").first_selected_option.text == "bert · mrpc · 1-bit kmeans · row · seed 0"


def test_a_task_can_be_picked(browse, study_page):
    driver = browse(study_page())
    picked = labelled(driver, "Task")
    assert [option.text for option in picked.options] == ["average", "mrpc", "cola"]
    average = rows(table(driver, "sizes"))
    picked.select_by_visible_text("cola")
    WebDriverWait(driver, 10).until(lambda _: rows(table(driver, "sizes")) != average)
    assert {row[0] for row in rows(table(driver, "sizes"))} == {"cola"}
    assert "more is better" in driver.find_element(By.ID, "chart-sizes").text


def test_another_model_shows_its_own_weights(browse, study_results, described):
    own = {"key2": described(importance={"E": 1.0, "C": 0.999, "P": 0.0})}
    page = render_study(ABOUT, study_results(), lambda key: own.get(key, described(floats=False)))
    driver = browse(page)
    assert "kept no errors and no histograms" in root(driver).text
    labelled(driver, "Cell").select_by_index(1)
    WebDriverWait(driver, 10).until(lambda _: marks(driver, "chart-errors", "rect"))
    assert len(marks(driver, "chart-errors", "rect")) == 2
    assert len(marks(driver, "chart-E", "rect")) == 2
    assert "kept no errors and no histograms" not in root(driver).text


def test_tables_are_sorted_by_a_click_and_by_keys(browse, study_page):
    driver = browse(study_page())
    details = table(driver, "cells")
    heads = details.find_elements(By.TAG_NAME, "th")
    place = [head.text for head in heads].index("score")
    column = lambda: [float(row[place]) for row in rows(details)]  # noqa: E731
    button = heads[place].find_element(By.TAG_NAME, "button")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert heads[place].get_dom_attribute("aria-sort") == "ascending"
    assert column() == sorted(column())
    button.send_keys(Keys.ENTER)
    assert heads[place].get_dom_attribute("aria-sort") == "descending"
    assert column() == sorted(column(), reverse=True)
    assert [head.get_dom_attribute("aria-sort") for head in heads].count("none") == len(heads) - 1


def test_failed_cells_and_missing_scores_stand_in_the_page(browse, study_results, described):
    results = study_results()
    results.loc[2, ["metric", "error", "score"]] = [None, "out of memory: give --memory", float("nan")]
    results.loc[4, ["score", "low", "high"]] = float("nan")
    driver = browse(render_study(ABOUT, results, lambda key: described()))
    (failure,) = rows(table(driver, "failures"))
    assert "out of memory: give --memory" in failure
    assert "1 failed" in root(driver).text
    assert marks(driver, "chart-sizes", "symbol")


# looks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_a_switch(browse, study_page, scheme):
    driver = browse(study_page(), scheme=scheme)
    script = (
        "const label = document.querySelector('#chart-sizes .role-axis-label text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(label).fill]"
    )
    dark = ["rgb(20, 23, 27)", "rgb(230, 233, 237)"]
    light = ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    before, after = (dark, light) if scheme == "dark" else (light, dark)
    assert driver.execute_script(script) == before
    button = driver.find_element(By.ID, "theme")
    assert button.get_dom_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.click()
    assert driver.execute_script(script) == after
    driver.execute_script("localStorage.clear()")


def test_a_phone_shows_all_without_scrolling_sideways(browse, study_page, model_page):
    driver = browse(study_page(), width=390)
    assert wide(driver) <= 390
    for details in driver.find_elements(By.CSS_SELECTOR, "details.numbers"):
        if details.is_displayed():
            table(driver, details.get_dom_attribute("data-table"))
    assert wide(driver) <= 390
    assert wide(browse(model_page(), width=390)) <= 390


def test_it_prints(browse, study_page):
    driver = browse(study_page(), scheme="dark")
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    script = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(script) == "rgb(255, 255, 255)"
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_it_is_small_and_soon_there(browse, study_page):
    page = study_page(tasks=[f"task{place}" for place in range(9)], models=["one", "two"], bits=range(1, 9))
    assert len(page.encode()) < 5_000_000
    start = time.perf_counter()
    driver = browse(page)
    seconds = time.perf_counter() - start
    loaded = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    drawn = int(root(driver).get_dom_attribute("data-drawn"))
    print(f"{len(page.encode()) / 1e6:.2f} MB: loaded after {loaded:.0f} ms, all drawn after {drawn} ms")
    assert seconds < 30


# strangers' names ------------------------------------------------------------------------------------


def test_names_are_never_code(browse, study_results, described, evil):
    results = study_results(
        models=[evil], tasks=[evil, "${alert(1)}"], schemes=[evil, "'+broken+'", "__proto__"]
    )
    results["groups"] = results["groups"].where(results["seed"] == 0, evil)
    results["metric"] = results["machine"] = results["versions"] = results["commands"] = evil
    failed = results.tail(1).assign(error=evil, metric=None)
    both = type(results)([*results.to_dict("records"), *failed.to_dict("records")])
    about = {"name": evil, "about": evil, "published": evil}
    page = render_study(about, both, lambda key: described(name=evil + ".{}.query.weight"))
    assert evil not in page
    driver = browse(page)
    assert driver.execute_script("return window.broken") is None
    assert not driver.find_elements(By.TAG_NAME, "img")
    assert driver.title == evil
    for details in driver.find_elements(By.CSS_SELECTOR, "details.numbers"):
        if details.is_displayed():
            table(driver, details.get_dom_attribute("data-table"))
    labelled(driver, "Task").select_by_index(1)
    symbol = driver.find_element(By.CSS_SELECTOR, "#chart-sizes .mark-symbol.role-mark path")
    webdriver.ActionChains(driver).move_to_element(symbol).perform()
    WebDriverWait(driver, 10).until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".vg-tooltip.visible"))
    assert evil[:30] in driver.find_element(By.CSS_SELECTOR, ".vg-tooltip").text
    assert driver.execute_script("return window.broken") is None
    assert not driver.find_elements(By.TAG_NAME, "img")


def test_what_got_into_the_page_all_the_same_cannot_run(driver, study_page, tmp_path):
    broken = study_page().replace(
        "<main", "<script>window.broken = 1</script><img src='http://127.0.0.1:9/x'><main"
    )
    Path(tmp_path / "report.html").write_text(broken, encoding="utf-8")
    driver.get((tmp_path / "report.html").as_uri())
    WebDriverWait(driver, 60).until(lambda _: root(driver).get_dom_attribute("data-drawn"))
    assert driver.execute_script("return window.broken") is None
    refused = [line["message"] for line in driver.get_log("browser")]
    assert len([line for line in refused if "Content Security Policy" in line]) == 2
    driver.get_log("performance")
