"Make the README's pictures from a home where the demo has run: `make pictures`."
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from bnml.core.base import home
from tests.test_panel_browser import CHROMIUM, QUIET, ROOT

IMAGES = ROOT / "nbs" / "images"


def shot(page: Path, target: Path, height: int) -> None:
    "A page as Chromium shows it at 1040 points, from its beginning."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        tab = browser.new_page(viewport={"width": 1040, "height": height})
        tab.goto(page.as_uri())
        tab.wait_for_selector(".main-svg")
        tab.wait_for_timeout(1500)
        tab.screenshot(path=target)
        browser.close()
    small(target, height)


def small(target: Path, height: int) -> None:
    "The upper part of a picture, in 256 colours."
    picture = Image.open(target).convert("RGB")
    picture.crop((0, 0, picture.width, min(height, picture.height))).quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def report(target: Path) -> None:
    "The newest backtest report from its verdict to its equity curve."
    pages = sorted((home() / "reports" / "backtest").glob("*/report.html"), key=lambda p: p.stat().st_mtime)
    if not pages:
        sys.exit("no backtest report yet: run `make demo` first")
    shot(pages[-1], target, 1680)


def sweep(target: Path) -> None:
    "A sweep of one of the demo's coins: what was tried, what luck would have reached, and the map."
    with tempfile.TemporaryDirectory() as folder:
        words = ("sweep", "--symbols", "SYN1USDT", "--rule", "ema", "-p", "fast=3:30:3", "-p", "slow=20:200:10", "-p", "stop=none", "--windows", "4", "--out", folder)
        subprocess.run([sys.executable, "-m", "bnml.cli", *words], cwd=ROOT, check=True)
        shot(Path(folder) / "maps.html", target, 710)


def panel(target: Path) -> None:
    "The panel over a paper runner, as its own test sees it."
    env = {**os.environ, "BNML_PANEL_PICTURE": str(target)}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_panel_browser.py"], cwd=ROOT, env=env, check=True)
    small(target, 830)  # below it JupyterLab asks whether one wants its news


if __name__ == "__main__":
    if CHROMIUM is None:
        sys.exit("pictures need Chromium: sudo apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    report(IMAGES / "report.png")
    sweep(IMAGES / "sweep.png")
    panel(IMAGES / "panel.png")
    print(*sorted(IMAGES.glob("*.png")), sep="\n")
