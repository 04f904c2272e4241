"""A real headless Chromium that opens a page and tells what it saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# The elements whose text is too faint: WCAG's contrast of the text's colour with what is behind it.
FAINT = """
const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const behind = one => {
  for (; one; one = one.parentElement) {
    const found = numbers(getComputedStyle(one).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll('body *')].filter(one => {
  if (![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim())) return false;
  const [a, b] = [light(numbers(getComputedStyle(one).color)), light(behind(one))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
}).map(one => `${one.tagName} ${one.textContent.slice(0, 40)}`);
"""


@dataclass(frozen=True)
class Look:
    """What is seen at one width and in one colour scheme; pixels."""

    scroll_width: int
    text_height: int
    background: str
    faint: list[str]


class Browser:
    """A page in a browser, until :func:`open_page` closes it."""

    def __init__(self, driver: Any, address: str) -> None:
        self._driver, self._address = driver, address
        self._driver.get(address)

    def _ask(self, script: str) -> Any:
        return self._driver.execute_script(script)

    def title(self) -> str:
        return str(self._driver.title)

    def look(self, width: int, scheme: str) -> Look:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
        self._driver.get(self._address)
        assert self._ask(f"return matchMedia('(prefers-color-scheme: {scheme})').matches")
        page = "document.documentElement"
        return Look(
            *self._ask(f"return [{page}.scrollWidth, {page}.scrollHeight]"),
            self._ask("return getComputedStyle(document.body).backgroundColor"),
            self._ask(FAINT),
        )

    def broken_links(self) -> list[str]:
        return self._ask(
            "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"
            ".filter(to => !document.getElementById(to.slice(1)))"
        )

    def repeated_ids(self) -> list[str]:
        return self._ask(
            "const ids = [...document.querySelectorAll('[id]')].map(one => one.id);"
            "return ids.filter((id, at) => ids.indexOf(id) !== at)"
        )

    def broken_pictures(self) -> list[str]:
        return self._ask(
            "return [...document.images].filter(one => !one.naturalWidth || !one.alt)"
            ".map(one => one.alt || 'without a text')"
        )

    def console(self) -> list[str]:
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Return every address that was asked for since the page was opened first."""
        sent = [
            json.loads(one["message"])["message"] for one in self._driver.get_log("performance")
        ]
        asked = [one["params"] for one in sent if one["method"] == "Network.requestWillBeSent"]
        addresses = {str(one["request"]["url"]) for one in asked}
        return {address for address in addresses if not address.startswith("data:")}


@contextmanager
def open_page(page: Path) -> Iterator[Browser]:
    """Open a page; skip the test where no browser or its driver is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver, page.as_uri())
    finally:
        driver.quit()
