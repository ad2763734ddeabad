"Make the README's pictures from a home where the demo has run: `make pictures`."
import os
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from bnml.core.base import home
from tests.test_panel_browser import CHROMIUM, QUIET, ROOT

IMAGES = ROOT / "nbs" / "images"


def report(target: Path) -> None:
    "The newest backtest report from its verdict to its equity curve."
    pages = sorted((home() / "reports" / "backtest").glob("*/report.html"), key=lambda p: p.stat().st_mtime)
    if not pages:
        sys.exit("no backtest report yet: run `make demo` first")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1040, "height": 1500})
        page.goto(pages[-1].as_uri())
        page.wait_for_selector(".main-svg")
        page.wait_for_timeout(1500)
        page.screenshot(path=target)
        browser.close()


def panel(target: Path) -> None:
    "The panel over a paper runner, as its own test sees it."
    env = {**os.environ, "BNML_PANEL_PICTURE": str(target)}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_panel_browser.py"], cwd=ROOT, env=env, check=True)


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("pictures need Chromium: sudo apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    report(IMAGES / "report.png")
    panel(IMAGES / "panel.png")
    print(*sorted(IMAGES.glob("*.png")), sep="\n")
