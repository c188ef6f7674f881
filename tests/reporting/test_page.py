"""The report in a real browser: sorting, folding, narrow screens, and its policy."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from example import outcome, result, run_folder

from covcli.reporting.report import report

SETS = ["mnist?limit=1000", "noise:gaussian", f"npz:{'/long' * 40}.npz?limit=5", "attack:pgd"]
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in [*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    evaluation = result(SETS, [outcome(passed=False, name=SETS[2])] * 3, points=49)
    folder = run_folder(tmp_path_factory.mktemp("runs") / "page", evaluation, explanations=2)
    return report(folder).html.resolve().as_uri()


def resize(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("width", [400, 800, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_leaves_the_page_and_nothing_is_logged(
    browser: Any, address: str, width: int, theme: str
) -> None:
    resize(browser, width)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    lost = "c => c.textContent && !c.checkVisibility()"
    cells = f"return [...document.querySelectorAll('td')].filter({lost}).length"
    assert browser.execute_script(cells) == 0
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.get_log("browser") == []


def column(browser: Any, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('main table')[1].tBodies[0].rows]"
        ".map(row => row.cells[arguments[0]].textContent)"
    )
    return list(browser.execute_script(script, number))


def test_a_click_on_a_head_sorts_the_rows(browser: Any, address: str) -> None:
    resize(browser, 1280)
    browser.get(address)
    table = browser.find_elements("css selector", "main table")[1]
    heads = table.find_elements("css selector", "thead th")
    for number in (0, 1):
        for direction, turned in (("ascending", False), ("descending", True)):
            heads[number].find_element("css selector", "button").click()
            assert heads[number].get_attribute("aria-sort") == direction
            values = column(browser, number)
            wanted = sorted(values, key=str.lower if number == 0 else float, reverse=turned)
            assert [v.lower() for v in values] == [v.lower() for v in wanted]
    assert heads[0].get_attribute("aria-sort") is None
    assert column(browser, 0) != SETS
    assert table.find_element("css selector", "tfoot th").text == "mean"


def test_the_contents_open_their_section(browser: Any, address: str) -> None:
    browser.get(address)
    folded = browser.find_elements("css selector", "details")
    assert not any(details.get_attribute("open") for details in folded)
    links = browser.find_elements("css selector", "nav a")
    assert len(links) == len(folded)
    links[3].click()
    assert [bool(details.get_attribute("open")) for details in folded].index(True) == 3


def test_a_script_from_elsewhere_does_not_run(browser: Any, address: str) -> None:
    browser.get(address)
    browser.execute_script(
        "const script = document.createElement('script');"
        "script.textContent = 'window.ran = true'; document.body.append(script);"
    )
    assert browser.execute_script("return window.ran === undefined")
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]
