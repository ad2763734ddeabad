"JupyterLab as a person meets it: the tour opens, names explain themselves, values and figures suit the page they stand on."
import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (ROOT / "bnml").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


@pytest.fixture(autouse=True)
def own_home():
    "Nothing is run here that writes."


def test_make_lab_opens_the_tour():
    found = re.search(r"^lab:.*\n\tjupyter lab (\S+) --LabApp.default_url=/lab/tree/(\S+) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.M)
    first = json.loads((ROOT / found[1] / found[2]).read_text())["cells"][0]
    assert "".join(first["source"]).startswith("# bnml: the tour\n")


@lru_cache(None)
def tree(path):
    return ast.parse(path.read_text())


def public(path):
    "What a room offers by name."
    return next((ast.literal_eval(n.value) for n in tree(path).body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])


def pairs(node):
    "(attribute, name of the function) of `A.b = _b` and of `A.b, A.c = _b, _c`."
    targets, values = node.targets[0], node.value
    both = zip(targets.elts, values.elts) if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple) else [(targets, values)]
    return [(t.attr, v.id) for t, v in both if isinstance(t, ast.Attribute) and isinstance(v, ast.Name)]


def silent(node):
    "It says nothing, and is more than the one line that explains itself."
    return not ast.get_docstring(node) and (isinstance(node, ast.ClassDef) or node.end_lineno > node.body[0].lineno)


def told_above(module):
    "Methods whose base class says what they do: help shows its words."
    return {m.name for n in module.body if isinstance(n, ast.ClassDef) for m in n.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)}


def speechless(module, named, above=frozenset()):
    "Public functions, classes and methods that say nothing."
    top = {n.name: n for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    methods = [(f"{c}.{m.name}", m) for c, n in top.items() if c in named and isinstance(n, ast.ClassDef) for m in n.body
               if isinstance(m, ast.FunctionDef) and not m.name.startswith("_") and not (n.bases and m.name in above)]
    given = [(name, top[name]) for n in module.body if isinstance(n, ast.Assign) for attr, name in pairs(n) if not attr.startswith("_") and name in top]
    return [name for name, n in [*((x, top[x]) for x in named if x in top), *methods, *given] if silent(n)]


def test_every_public_name_says_what_it_is():
    above = set().union(*(told_above(tree(p)) for p in MODULES))
    found = {str(p.relative_to(ROOT)): said for p in MODULES if (said := speechless(tree(p), public(p), above))}
    assert not found and not [p for p in MODULES if not ast.get_docstring(tree(p))]


def test_the_check_can_fail():
    body = "\n        x = 1\n        return x\n"
    code = f"class A(B):\n    'a'\n    def m(self):{body}    def n(self): return 1\n    def o(self):{body}class C: pass\ndef _g(self):{body}A.g, A._h = _g, _g\ndef f():{body}"
    assert speechless(ast.parse(code), ["A", "C", "f"], {"o"}) == ["C", "f", "A.m", "_g"]


def test_a_star_brings_no_guest():
    "Names that a room offers were made in it: nobody gets numpy by asking for charts."
    lent = {}
    for path in MODULES:
        made = {a.asname or a.name.split(".")[0] for n in tree(path).body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        if guests := made & set(public(path)): lent[path.name] = guests
    assert not lent and len(public(ROOT / "bnml/lab/charts.py")) > 20


def test_frames_name_their_index():
    "An index that is more than row numbers says what it counts."
    from bnml.data.bars import align_higher, gaps, resample
    from bnml.data.synth import synth_bars
    from bnml.lab.curve_metrics import drawdown_table
    from bnml.lab.metrics import monthly_table, symbol_table, trade_frame
    from bnml.lab.rolling import period_table, rolling_table
    from bnml.ml.features import feature_frame
    bars = synth_bars("SYN1USDT", "1h", "2024-01-01", "2024-01-21")
    times, higher = bars.index.as_unit("ms").asi8, resample(bars, "1h", "4h")
    worth = bars.close.to_numpy()
    found = [f.index.name for f in (
        bars, higher, align_higher(bars, higher, "1h", "4h"), feature_frame(bars), rolling_table(worth, times, 48), monthly_table(worth, times), period_table(worth, times),
        symbol_table([]), gaps(bars, "1h"), drawdown_table(worth, times), trade_frame([]))]
    assert found == ["open_time"] * 5 + ["year", "month", "symbol", None, None, None]


def test_values_show_themselves_and_stay_small():
    from bnml.core.card import Card
    from bnml.data.lake import Finding as Note
    from bnml.domain.orders import Fill, Order, OrderIntent
    from bnml.domain.plan import ExitPlan
    from bnml.domain.portfolio import ClosedTrade, Portfolio, Position
    from bnml.domain.signal import Proposal, Signal, Verdict
    from bnml.ml.audit import AuditReport, Finding
    from bnml.ml.bundle import Bundle, Manifest
    from bnml.trade.moments import Violation
    values = [Note, Fill, Order, OrderIntent, ExitPlan, ClosedTrade, Portfolio, Position, Proposal, Signal, Verdict, AuditReport, Finding, Violation]
    assert all(issubclass(v, Card) and v.__dictoffset__ == 0 for v in values)
    assert all(hasattr(v, "_repr_html_") for v in (Bundle, Manifest))
