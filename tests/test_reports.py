"Every template runs once, tiny, as a job of the schedule, and its page draws all its figures in a browser that may reach nobody."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest

from bnml.cli import main
from bnml.core.base import BadData, StorageError, UsageError
from bnml.core.clock import to_ms
from bnml.core.files import write_all
from bnml.data.lake import Lake
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.lab.artifacts import make_run_id
from bnml.lab.hunt import Hunt
from bnml.lab.lines import grid
from bnml.lab.vector import backtest_vector
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.train import train
from bnml.ops import apart
from bnml.ops.desk import open_station
from bnml.ops.report import Report, run_report, templates
from bnml.ops.runs import Runs
from bnml.ops.shelf import diff_reports, list_reports, write_index
from bnml.trade.rules import Crossover
from tests import nursery

START, HOURS = to_ms("2025-01-01"), 2000
BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
SUBJECTS = {"backtest", "training", "trading_day", "risk_audit", "universe", "last_month"}  # what this file makes a subject for
TINY = {"last_month": {"days": 20, "most": 1, "windows": 1, "rule": "breakout"}}
WIDTHS = (1400, 390)
sys.modules.setdefault("rfc3987_syntax", None)  # as `execute` does before papermill is read
READ = ("papermill", "nbconvert.filters.markdown_mistune", "IPython.core.interactiveshell", "ipykernel.kernelapp", "ipykernel.ipkernel", "plotly.graph_objects", "plotly.io", "statsmodels.api",
        "bnml.lab.backtest_page", "bnml.lab.training_page", "bnml.lab.evidence_page", "bnml.lab.day_page", "bnml.lab.risk_page", "bnml.lab.universe_page", "bnml.lab.month_page", "bnml.ops.month", "bnml.ops.subjects")


@pytest.fixture(scope="module")
def market() -> dict:
    return synth_market(["BTCUSDT", "ETHUSDT"], "1h", START, START + HOURS * 3_600_000, 7)


def a_backtest(market, **asked):
    "A small vector backtest in the common folder."
    run = backtest_vector(Crossover(5, 20), Panel.from_frames(market, "1h"), **asked)
    params = {"strategy": "rules.crossover", "symbols": sorted(market), "interval": "1h", "engine": "vector", **asked}
    return run.save(None, params | {"run_id": make_run_id(params, "synthetic")})


@pytest.fixture(autouse=True)
def a_rule(monkeypatch):
    "A strategy that needs no models, for the templates that read the settings."
    monkeypatch.setenv("BNML__STRATEGY", "rules.crossover")


@pytest.fixture(autouse=True)
def forked_kernels(monkeypatch, request):
    "Kernels that have read their libraries already; all but the first template's, whose kernel starts as everybody's."
    if "backtest-" in request.node.name: return
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", partial(nursery.kernel, more=READ))


A_COMMAND = """
import sys
from tests import nursery
nursery.branch()
import jupyter_client.provisioning.local_provisioner as local
local.launch_kernel = nursery.kernel
from bnml.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Forked:
    "A job's process as `Popen` would start it, forked from one that has its libraries already; so is its kernel."
    def __init__(self, command, stdout, env, **_):
        assert command[:3] == [sys.executable, "-m", "bnml.cli"]
        self.child = nursery.start("-c", A_COMMAND, *command[3:], env=env, start_new_session=True, more=(*nursery.OURS, *READ))
        self.pid, self.poll = self.child.pid, self.child.poll
        self.ears = [threading.Thread(target=pour, args=(pipe, os.dup(stdout.fileno()))) for pipe in (self.child.stdout, self.child.stderr)]
        for ear in self.ears: ear.start()

    def wait(self, timeout=None) -> int:
        code = self.child.wait(timeout)
        for ear in self.ears: ear.join(30)
        return code


def pour(pipe, fd: int):
    "All that comes out of a pipe, into a file."
    with pipe, open(fd, "w") as log: shutil.copyfileobj(pipe, log)


@pytest.fixture
def as_a_job(own_home, monkeypatch, request):
    "`bnml schedule run` starts `bnml report`, which starts a kernel: processes as everybody's for the first template, forked ones for the others."
    if "backtest-" not in request.node.name:
        monkeypatch.setattr(apart, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired))
    def run(template: str, params: dict) -> Report:
        (own_home / "bot.yaml").write_text(f"schedule: {{jobs: [{{name: page, cron: '@daily', do: report, template: {template}, params: {json.dumps(params)}}}]}}\n")
        code = main(["schedule", "run", "page"])
        [done] = Runs().of("page")
        said = Path(done.output).read_text()
        assert (code, done.status, done.exit_code) == (0, "done", 0), said
        folder = Path(next(line for line in reversed(said.splitlines()) if line.endswith("report.html"))).parent
        return Report(template, folder.name, folder)
    return run


@pytest.fixture
def subject(market, own_home):
    "Makes the subject of a template."
    def make(template):
        if template == "backtest":
            a_backtest(market)
        if template == "training":
            settings = ModelSettings(horizons=(5,), models=("lgb",), trees=10, depth=3, n_splits=2, min_rows=500, threads=1, feature_limit=10)
            results = train(market, settings, ["BTCUSDT"], "1h", registry=Registry())
            assert not results[0].error
        if template in ("trading_day", "risk_audit"):
            a_session(market)
        if template in ("universe", "last_month"):
            stored(market)
    return make


def stored(market):
    "The market in the lake of this home."
    for symbol, bars in market.items():
        Lake().write(symbol, "1h", bars, "synthetic market, seed 7")


def a_session(market):
    "A fortnight of paper trading over the lake, in the ledger."
    stored(market)
    with open_station(None, {"strategy": "rules.crossover"}, (START + 1200 * 3_600_000, START + 1536 * 3_600_000)) as station:
        station.run()


@pytest.fixture(scope="module")
def browser():
    "One Chromium for all pages; None where there is none."
    if not BROWSER:
        yield None
        return
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


def look(browser, page_path) -> list[dict]:
    "Open a page in Chromium, make its window narrow, open it in the narrow one: each time what it asked for, what it complained about, what its figures look like."
    asked, errors = [], []
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(page_path.as_uri(), wait_until="load")
    seen = []
    for n, width in enumerate((*WIDTHS, WIDTHS[-1])):
        page.set_viewport_size({"width": width, "height": 900})
        if n == len(WIDTHS): page.reload(wait_until="load")
        page.wait_for_function("w => [...document.querySelectorAll('.figure')].every(f => f.querySelector('.main-svg')?.getBoundingClientRect().right <= w)", arg=width, timeout=30_000)
        seen.append(dict(errors=errors, asked=asked, collided=page.evaluate(COLLIDED) if n != 1 else [], **_drawn(page)))
    page.close()
    for s in seen: s["outside"] = [u for u in s.pop("asked") if not u.startswith(("file:", "data:", "blob:"))]
    return seen


COLLIDED = """[...document.querySelectorAll('.figure')].flatMap(f => {
    const frame = f.getBoundingClientRect(), found = ['.gtitle', '.legend', '.xtitle'].flatMap(s => [...f.querySelectorAll(s)]).map(e => [e, e.getBoundingClientRect()]).filter(([, r]) => r.width > 0);
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    const out = ([, r]) => r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1;
    const name = e => e.getAttribute('class') + ': ' + e.textContent;
    return [...found.filter(out).map(([e]) => name(e) + ' is cut'), ...found.flatMap(([e, a], i) => found.slice(i + 1).filter(([, b]) => meet(a, b)).map(([g]) => name(e) + ' on ' + name(g)))];
})"""


def _drawn(page) -> dict:
    "What stands on the page, at its present width."
    drawn = page.eval_on_selector_all(".figure", """boxes => boxes.map(b => ({
        area: b.querySelector('.main-svg').getBoundingClientRect().height * b.querySelector('.main-svg').getBoundingClientRect().width,
        marks: b.querySelectorAll('.main-svg path, .main-svg image, .main-svg rect').length}))""")
    code_before = page.locator(".code").first.is_visible()
    page.click("#toggle")
    code_after = page.locator(".code").first.is_visible()
    page.click("#toggle")
    targets = page.eval_on_selector_all("nav a", "links => links.map(a => document.getElementById(decodeURIComponent(a.hash.slice(1))) !== null)")
    return dict(drawn=drawn, toggled=(code_before, code_after), targets=targets, over=page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def html_text(page) -> str:
    "A page's text without its marks."
    return unescape(re.sub("<[^>]+>", "", page.split("<main>")[1].split("</main>")[0]))


def test_every_template_has_a_subject_here():
    assert SUBJECTS == set(templates())


@pytest.mark.parametrize("template, figures", [("backtest", 4), ("training", 8), ("trading_day", 2), ("risk_audit", 3), ("universe", 3), ("last_month", 4)])
def test_a_job_makes_a_report_that_opens_offline_with_every_figure(template, figures, subject, as_a_job, browser):
    subject(template)
    report = as_a_job(template, TINY.get(template, {}))
    html = report.html.read_text()
    assert html.count('class="figure"') == figures
    assert html.count("plotly.js v") == 1, "plotly.js stands in the page once"
    assert json.loads((report.folder / "metrics.json").read_text())
    assert not any(c["outputs"] for c in json.loads(templates()[template].read_text())["cells"] if c["cell_type"] == "code"), "templates are stored without outputs"
    if not BROWSER:
        pytest.skip("no Chromium to open the page with: apt-get install chromium")
    for seen in look(browser, report.html):
        assert seen["outside"] == [] and seen["errors"] == [] and seen["over"] == 0, "nothing from outside, no error, no page wider than the window"
        assert seen["collided"] == []
        assert len(seen["drawn"]) == figures and all(f["area"] > 10_000 and f["marks"] > 5 for f in seen["drawn"])
        assert seen["toggled"] == (False, True) and len(seen["targets"]) >= 3 and all(seen["targets"])
    about = json.loads((report.folder / "about.json").read_text())
    assert about["headline"] in html_text(html) and about["asked"] and about["command"].startswith(f"bnml report {template.replace('_', '-')}")


def test_the_same_report_twice_and_another_one(market):
    made = []
    first = run_report("backtest", fallback=lambda: {"run_dir": str(made.append(1) or a_backtest(market))})
    assert made == [1] and first.html.exists(), "a run is made where there is none"
    again = run_report("backtest", fallback=lambda: pytest.fail("there is a backtest already"))
    assert first == again and len(list_reports()) == 1
    a_backtest(market, quote_per_trade=100.0)
    other = run_report("backtest")
    assert other.run_id != first.run_id and [r["run_id"] for r in list_reports()] == [other.run_id, first.run_id]
    assert diff_reports(first.run_id, other.run_id)["metrics"]["fees"][2] < 0, "smaller trades pay smaller fees"


def test_a_template_that_refuses_says_why_and_leaves_nothing(own_home):
    with pytest.raises(BadData, match="run `bnml backtest` first"):
        run_report("backtest")
    with pytest.raises(BadData, match="run `bnml train` first"):
        run_report("training")
    assert not list((own_home / "reports").glob("*/*"))

    for template in ("trading_day", "risk_audit"):
        with pytest.raises(BadData, match="the ledger has no session yet"):
            run_report(template)
    for template in ("universe", "last_month"):
        with pytest.raises(BadData, match="the lake has no 1h bars"):
            run_report(template)
    assert not list((own_home / "reports").glob("*/*"))


def test_parameters_are_refused_in_one_sentence(own_home):
    for params, said in (({"dayz": "x"}, "has no parameter 'dayz'; it takes session, day, symbol, drift"), ({"drift": "perhaps"}, "takes true or false, not 'perhaps'"),
                         ({"day": "yesterday"}, "'yesterday' is no day; write it as 2025-03-01")):
        with pytest.raises(UsageError, match=said):
            run_report("trading_day", params)
    with pytest.raises(UsageError, match="parameter 'horizon' takes a whole number, not 'five'"):
        run_report("training", {"horizon": "five"})
    assert not (own_home / "reports").exists()


def test_an_empty_day_says_so(market):
    a_session(market)
    cells = [c for c in json.loads(templates()["trading_day"].read_text())["cells"] if c["cell_type"] == "code"]
    space, said = {}, []
    for cell in cells:  # every cell, without the seconds of a kernel
        *before, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(before, []), "cell", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(compile(ast.Module([last], []), "cell", "exec"), space)
            space["day"] = "2030-01-01"
        else:
            said.append(eval(compile(ast.Expression(last.value), "cell", "eval"), space))
    assert "An empty day: session replay" in said[0].markup and 'class="line bad"' in said[0].markup
    assert said[2].data["bars"] == 0 and said[3] is None, "no bar, no figure"


def test_the_index_can_be_searched_and_marks_what_stopped(own_home, browser):
    for run_id, about in (("0a", {"headline": "It lost 2 % on ETHUSDT."}), ("0b", {"headline": "It made 1 % on ETHUSDT."}), ("0c-failed", {"error": "report backtest stopped in cell 3"})):
        folder = own_home / "reports" / "backtest" / run_id
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps(about))
        (folder / "report.html").write_text("<p>")
    index = write_index()
    assert index.read_text().count("<tr class=\"failed\">") == 1
    if not browser:
        pytest.skip("no Chromium to open the page with: apt-get install chromium")
    page = browser.new_page()
    page.goto(index.as_uri())
    left = lambda words: (page.fill("#search", words), page.locator("tbody tr:visible").count())[1]
    assert [left(w) for w in ("", "ethusdt", "lost ethusdt", "stopped", "no such word")] == [3, 2, 1, 1, 0]
    page.close()


def test_reports_that_run_at_once_all_stand_on_the_shelf(market, own_home):
    stored(market)
    with open(own_home / "said.log", "wb") as log:
        runs = [Forked([sys.executable, "-m", "bnml.cli", "report", "universe", "-p", f"days={days}"], log, dict(os.environ)) for days in (30, 30, 20)]
    assert [run.wait(120) for run in runs] == [0, 0, 0], (own_home / "said.log").read_text()
    there = list_reports()
    assert sorted(r["params"]["days"] for r in there) == [20, 30], "the same question twice is one report"
    index = (own_home / "reports" / "index.html").read_text()
    assert all(r["run_id"] in index for r in there) and index.count("<tr><td>") == 2


@pytest.fixture
def small_disk(own_home):
    "Reports on a disk of a mebibyte."
    place = own_home / "reports"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"mounting a small disk needs root and its capabilities: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_leaves_the_shelf_as_it_was(small_disk, tmp_path, monkeypatch):
    template = tmp_path / "line.ipynb"
    template.write_text('{"cells": []}')
    cell = lambda text: {"cells": [{"cell_type": "code", "source": "", "metadata": {}, "outputs": [{"output_type": "stream", "name": "stdout", "text": text}]}]}
    pages = iter([cell("short"), cell("long" * 500_000)])
    monkeypatch.setattr("bnml.ops.report.execute", lambda *_: next(pages))
    first = run_report(str(template))
    kept = {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()}
    with pytest.raises(StorageError, match="reports/line failed: No space left on device; free the disk or make the folder writable, nothing was changed") as e:
        run_report(str(template))
    assert e.value.exit_code == 75 and first.html in kept
    assert {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()} == kept


def test_a_full_disk_leaves_a_sweep_as_it_was(small_disk, monkeypatch):
    monkeypatch.setattr(Hunt, "not_modelled", ("spread",))  # saves reading vectorbt
    tried = grid("ema", fast=[4, 8], slow=[20, 40]).assign(symbol="BTCUSDT", sharpe_bar=0.01, plateau=0.01)
    found = Hunt("ema", tried, tried.assign(chosen_by="peak", edge=""), None, {"BTCUSDT": {"said": "4 tried"}})
    for disk in ("empty", "with the last sweep on it"):  # the figures fit, the page of the maps does not: plotly.js alone is bigger
        with pytest.raises(StorageError, match="reports/sweep failed: No space left on device; free the disk or make the folder writable, nothing was changed"):
            found.save(small_disk / "sweep")
        assert {p.name: p.read_text() for p in small_disk.rglob("*") if p.is_file()} == ({} if disk == "empty" else {"verdict.json": "{}"})
        write_all(small_disk / "sweep", {"verdict.json": "{}"})


def test_a_grid_too_big_for_memory_is_refused_with_its_number(own_home, capsys):
    assert main(["sweep", "-p", "fast=1:9999", "-p", "slow=1:9999", "-p", "stop=none,0.03"]) == 2
    err = capsys.readouterr().err
    assert "a grid of 199,960,002 configurations needs " in err and "ask for at most " in err and err.count("\n") == 1  # 9,999 × 9,999 × 2
