"""The real page in headless Chromium: it shows what ``zerocast predict`` says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from estimator.units import format_bytes

pytestmark = pytest.mark.browser
TREE = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1440,1500",
)  # fmt: skip

if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)", allow_module_level=True
    )
webdriver = pytest.importorskip("selenium.webdriver")


def zerocast(*args: str, **kwargs) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TREE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "zerocast", *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **kwargs)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A dashboard that is being served."""
    process = zerocast("dashboard", "--json", "--store", str(tmp_path / "runs.db"))
    assert process.stdout is not None
    text = ""
    while "}" not in text:
        line = process.stdout.readline()
        assert line, "the dashboard ended before it gave its address"
        text += line
    yield json.loads(text)["url"]
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.fixture
def browser() -> Iterator[object]:
    """Headless Chromium with a profile of its own."""
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="zerocast-chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def wait_for(browser, condition, what: str):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 90).until(condition, what)


def screenshot(browser, tmp_path: Path, name: str) -> None:
    """Saves what is seen, under ``$ZEROCAST_SCREENSHOTS`` when it is set."""
    folder = Path(os.environ.get("ZEROCAST_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 20_000


def test_page_shows_the_forecast(url: str, browser, tmp_path: Path) -> None:
    import time

    flags = ["--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--zero", "3", "--seq-len", "4096"]
    said, _ = zerocast("predict", *flags, "--json").communicate(timeout=60)
    expected = format_bytes(json.loads(said)["device_used_bytes"])
    browser.get(url)

    def metric(label: str) -> str | None:
        for box in browser.find_elements("css selector", '[data-testid="stMetric"]'):
            lines = box.text.split("\n")
            if lines[0] == label:
                return lines[1]
        return None

    wait_for(browser, lambda _: metric("Needs per GPU"), "the figures did not appear")
    assert metric("Needs per GPU") == expected
    wait_for(
        browser,
        lambda b: (
            len(
                b.find_elements(
                    "css selector", '[data-testid="stVegaLiteChart"] canvas, [data-testid="stVegaLiteChart"] svg'
                )
            )
            >= 2
        ),
        "no charts",
    )
    time.sleep(1.5)  # charts fade in
    screenshot(browser, tmp_path, "forecast")
    (tab,) = [t for t in browser.find_elements("css selector", '[role="tab"]') if t.text == "Recorded runs"]
    tab.click()
    wait_for(
        browser,
        lambda b: "zerocast measure" in b.find_element("tag name", "body").text,
        "the empty store has no advice",
    )
    screenshot(browser, tmp_path, "runs")
