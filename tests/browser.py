"""The server's page in headless Chromium, as a user has it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from needed import need
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from stub_server import Stub

SHOTS = Path(__file__).resolve().parent.parent / "build" / "screenshots"


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser, closed with the context."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(need("chromium", "chromium")))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which(need("chromedriver", "chromium-driver")))
    chrome = webdriver.Chrome(options, service)
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The page of a server, and what a user does there."""

    def __init__(self, driver: webdriver.Chrome, stub: Stub) -> None:
        self.driver, self.stub = driver, stub
        self.expected: list[str] = []  # what may stand in the browser's log

    def open(self, *, width: int = 1280, height: int = 900, dark: bool = False, calm: bool = True) -> "Page":
        features = [("prefers-color-scheme", "dark" if dark else "light")]
        features.append(("prefers-reduced-motion", "reduce" if calm else "no-preference"))
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": name, "value": value} for name, value in features]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(self.stub.url)
        self.until(lambda: self.script("return models.length > 0 || !document.getElementById('error').hidden"))
        return self

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        source = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return self.script(source, selector)

    def until(self, holds: Any) -> None:
        WebDriverWait(self.driver, 30, poll_frequency=0.02).until(lambda _: holds())

    def write(self, prompt: str = "One day", *, wait: bool = True) -> None:
        self["prompt"].send_keys(prompt)
        self["write"].click()
        if wait:
            self.settled()

    def settled(self) -> None:
        self.until(lambda: self.script("return busy === null && queue.length === 0 && playing === 0"))

    def press(self, *keys: str) -> None:
        for each in keys:
            self.driver.switch_to.active_element.send_keys(each)

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        self.script("document.activeElement.blur(); scrollTo(0, 0)")
        width = self.script("return innerWidth")
        metrics = {"width": width, "height": int(size["height"]), "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def fits(self) -> bool:
        return self.script("return document.documentElement.scrollWidth <= innerWidth")
