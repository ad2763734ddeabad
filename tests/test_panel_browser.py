"The panel as a person meets it: JupyterLab in Chromium, a paper runner started by a click, an equity curve that moves."
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: sudo apt-get install chromium")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(ready, seconds: float, what: str):
    "Poll until `ready()` is true."
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.3)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture
def jupyter(own_home, tmp_path):
    "JupyterLab on loopback over a copy of the panel's notebook."
    folder = tmp_path / "nbs"
    folder.mkdir()
    shutil.copy(ROOT / "nbs" / "panel.ipynb", folder)
    port = free_port()
    env = {**os.environ, "BNML_HOME": str(own_home), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "PYTHONPATH": str(ROOT), "JUPYTER_NO_CONFIG": "1"}
    env.pop("IN_TEST")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.token=", "--ServerApp.password=",
                               "--allow-root", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
                              cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/api"), 60, "JupyterLab's start")
    yield f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?reset"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(20)


def points(page) -> int:
    "Points of the equity curve on the screen."
    curve = page.query_selector("svg.bnml-equity")
    return int(curve.get_attribute("data-points")) if curve else 0


def run_all(page):
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=60_000)
    page.click(".lm-MenuBar-itemLabel:text-is(\"Run\")")
    page.click(".lm-Menu-itemLabel:text-is(\"Run All Cells\"), .lm-Menu li:has-text(\"Run All Cells\") >> nth=0")
    page.wait_for_selector("button:has-text('Start paper')", timeout=60_000)


def test_a_click_starts_paper_trading_and_the_curve_moves(jupyter, own_home):
    from playwright.sync_api import sync_playwright

    from bnml.ops.status import read_status

    picture = os.environ.get("BNML_PANEL_PICTURE")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 980})
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(jupyter)
        run_all(page)
        assert points(page) == 0 and "stopped" in page.inner_text(".bnml-head")
        page.fill("input[placeholder^='strategy']", "rules.crossover")
        page.fill("input[type=number]", "0.1")
        page.click("button:has-text('Start paper')")
        wait_until(lambda: points(page) >= 5, 60, "an equity curve of five points")
        first = points(page)
        wait_until(lambda: points(page) > first, 30, "the curve's growth")
        assert read_status()["alive"]
        if picture:
            wait_until(lambda: points(page) >= 40 and read_status()["open_positions"], 120, "a curve worth a picture")
            page.keyboard.press("Control+b")
            page.wait_for_timeout(1500)
            page.screenshot(path=picture)
        page.click("button:has-text('Pause')")
        wait_until(lambda: read_status().get("paused"), 20, "the pause")
        page.click("button:has-text('Stop')")
        wait_until(lambda: not read_status()["alive"], 30, "the runner's end")
        browser.close()
    outside = [u for u in asked if not u.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))]
    assert not outside, outside
