"A writer that dies at any moment leaves the lake as it was, or as it was to be; two writers don't lose each other's bars."
import os
import signal
import time

import pandas as pd
import pytest

from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
from tests import nursery

WRITER = """
import sys, time
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
bars = synth_bars("BTCUSDT", "1h", "2023-01-01", "2026-01-01")
print("ready", flush=True)
shift = 0
while True:  # rewrites three years over and over
    shift += 1
    Lake(sys.argv[1]).write("BTCUSDT", "1h", bars.assign(volume=bars.volume + shift), f"round {shift}", replace=True)
"""

SLOW = """
import os, sys, time
real = os.replace
def slow(a, b):
    if str(b).endswith(sys.argv[2]):
        print("replacing", flush=True)
        time.sleep(60)
    real(a, b)
os.replace = slow
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
Lake(sys.argv[1]).write("BTCUSDT", "1h", synth_bars("BTCUSDT", "1h", "2025-01-01", "2025-06-01"), "second")
"""

JOINER = """
import sys
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars
bars = synth_bars("BTCUSDT", "1h", "2025-01-01", "2025-03-01")
for i in range(int(sys.argv[2]), len(bars), 48):
    Lake(sys.argv[1]).write("BTCUSDT", "1h", bars[i:i + 24], "part")
"""


def start(code: str, *args) -> nursery.Child:
    return nursery.start("-c", code, *args)


def healthy(root) -> Lake:
    lake = Lake(root)
    assert [f for f in lake.check() if f.level == "error"] == []
    return lake


@pytest.mark.parametrize("at", [".parquet", "manifest.json"])
def test_killed_before_the_new_file_counts(tmp_path, at):
    old = synth_bars("BTCUSDT", "1h", "2025-01-01", "2025-02-01")
    Lake(tmp_path).write("BTCUSDT", "1h", old, "first")
    writer = start(SLOW, tmp_path, at)
    assert writer.stdout.readline() == "replacing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    pd.testing.assert_frame_equal(healthy(tmp_path).read("BTCUSDT", "1h"), old)
    Lake(tmp_path).write("BTCUSDT", "1h", synth_bars("BTCUSDT", "1h", "2025-02-01", "2025-03-01"), "after")  # the lock died with it
    assert [p.suffix for p in tmp_path.rglob("*.*") if p.suffix == ".tmp"] == [], "the dead writer's leavings are swept up"
    assert len(healthy(tmp_path).read("BTCUSDT", "1h")) == 59 * 24


def test_killed_at_any_moment(tmp_path):
    bars = synth_bars("BTCUSDT", "1h", "2023-01-01", "2026-01-01")
    Lake(tmp_path).write("BTCUSDT", "1h", bars, "first")
    for pause in (0.011, 0.037, 0.083):
        writer = start(WRITER, tmp_path)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        found = healthy(tmp_path).read("BTCUSDT", "1h")
        shift = (found.volume - bars.volume).round(3)
        assert shift.nunique() == 1, "years of two different writes"
        pd.testing.assert_frame_equal(found[["open", "close"]], bars[["open", "close"]])


def test_two_writers_at_once(tmp_path):
    writers = [start(JOINER, tmp_path, first) for first in (0, 24)]
    assert [w.wait() for w in writers] == [0, 0]
    pd.testing.assert_frame_equal(healthy(tmp_path).read("BTCUSDT", "1h"), synth_bars("BTCUSDT", "1h", "2025-01-01", "2025-03-01"))
