"The plan of the house holds: imports go down, guests keep to their door, every module has its notebook."
import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["core", "domain", "venue", "data", "ml", "trade", "lab", "ops"]
MAX_LINES = 350

# a guest and the rooms that may let it in; an empty tuple means no exported room may
DOORS = {
    "vectorbt": ("lab.vector",), "plotly": ("lab.charts",), "kaleido": ("lab.pictures",), "papermill": ("ops.report",),
    "ipywidgets": ("ops.panel",), "fastapi": ("ops.web", "venue.rehearsal"), "uvicorn": ("ops.web", "venue.rehearsal"), "starlette": (), "ccxt": ("venue.ccxt",),
    "apscheduler": ("core.cron",), "optuna": ("ml.search", "ml.storage"), "talib": ("ml.indicators",), "openai": ("trade.advisor",), "nbdev": (), "fastcore": (), "execnb": (), "matplotlib": (),
    "dask": ("ml.tasks",), "distributed": ("ml.tasks",), "backtesting": (), "pandas_ta_classic": (), "hypothesis": (), "pytest": (),
    "sklearn": ("ml.models", "ml.sequence", "ml.select"), "xgboost": ("ml.models",), "lightgbm": ("ml.models",),
    "skl2onnx": ("ml.models", "ml.convert"), "onnxmltools": ("ml.models", "ml.convert"), "onnxruntime": ("ml.bundle", "ml.registry", "ml.models", "ml.convert"),
}


def rooms() -> dict[str, dict]:
    "Every library notebook: the module it exports, its floor and its number."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb")):
        code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        target = next((m.group(1) for c in code if (m := re.search(r"^#\| *default_exp (\S+)", c, re.M))), None)
        assert target, f"{path} exports nothing: a library notebook needs `#| default_exp`"
        floor, number = int(path.parent.name[:2]), int(path.name[:2]) if path.name[:2].isdigit() else 0
        found[target] = {"path": path, "floor": floor, "number": number}
    return found


ROOMS = rooms()


def module_file(room: str) -> Path:
    return ROOT / "bnml" / (room.replace(".", "/") + ".py")


@lru_cache(None)
def imports(room: str) -> list[tuple[int, str]]:
    "Absolute names of all that a room imports, inside functions too, with the line."
    package = ["bnml", *room.split(".")[:-1]]
    out = []
    for node in ast.walk(ast.parse(module_file(room).read_text())):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            out.append((node.lineno, full))
            out += [(node.lineno, f"{full}.{alias.name}") for alias in node.names if f"{full}.{alias.name}".removeprefix("bnml.") in ROOMS]
    return out


def upward(room: str, lines: list[tuple[int, str]]) -> list[str]:
    "The imports that go up, or sideways to a later room."
    me, found = ROOMS[room], []
    for line, name in lines:
        other = ROOMS.get(name.removeprefix("bnml.")) if name.startswith("bnml.") else None
        if other and (other["floor"], other["number"]) >= (me["floor"], me["number"]):
            found.append(f"{room}:{line} imports {name}")
    return found


def strangers(room: str, lines: list[tuple[int, str]]) -> list[str]:
    "The guests that came in by another door than their own."
    return [f"{room}:{line} imports {name}" for line, name in lines
            if (guest := name.split(".")[0]) in DOORS and room not in DOORS[guest]]


@pytest.fixture(autouse=True)
def own_home():
    "Nothing is run here, only read: hundreds of tests need no folder of their own."


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room):
    assert not upward(room, imports(room))


@pytest.mark.parametrize("room", ROOMS)
def test_guests_keep_to_their_door(room):
    assert not strangers(room, imports(room))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stays_small(room):
    assert module_file(room).read_text().count("\n") <= MAX_LINES


def test_every_module_has_its_notebook():
    modules = {".".join(p.relative_to(ROOT / "bnml").with_suffix("").parts) for p in (ROOT / "bnml").rglob("*.py")
               if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(ROOMS)


def test_no_name_is_both_module_and_package():
    assert not [p for p in (ROOT / "bnml").rglob("*.py") if p.with_suffix("").is_dir()]


def test_modes_are_matched_in_one_place():
    "Only the desk chooses by mode; a mode check anywhere else would make a second path."
    def matches(room):
        text = module_file(room).read_text()
        if "match" not in text and "Mode" not in text: return []
        return [n.lineno for n in ast.walk(ast.parse(text))
                if (isinstance(n, ast.Match) and "mode" in ast.unparse(n.subject).lower())
                or (isinstance(n, ast.Compare) and re.search(r"Mode\.(PAPER|TESTNET|LIVE)", ast.unparse(n)))]
    allowed = {"core.config", "ops.desk"}
    assert not {room: lines for room in ROOMS if room not in allowed and (lines := matches(room))}


def test_the_checks_can_fail():
    "Planted faults: an upward import, a guest at the wrong door."
    assert upward("core.base", [(1, "bnml.trade.engine")]) == ["core.base:1 imports bnml.trade.engine"]
    assert upward("core.base", [(1, "bnml.core.num")])
    assert not upward("core.num", [(1, "bnml.core.base")])
    assert strangers("trade.engine", [(3, "vectorbt")]) == ["trade.engine:3 imports vectorbt"]
    assert not strangers("lab.vector", [(3, "vectorbt")])
