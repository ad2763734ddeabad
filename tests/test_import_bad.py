"Whatever is wrong with a candle file is said in one sentence with file, row and remedy, and the lake stays as it was."
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from bnml.core.base import BadData, BnmlError, StorageError, UsageError, home
from bnml.core.clock import RealClock, floor_ms
from bnml.data.bars import bars_from_arrays, times_of
from bnml.data.history import import_file, import_files
from bnml.data.lake import Lake
from bnml.data.synth import synth_bars

HOUR = 3_600_000


@pytest.fixture
def bars():
    return synth_bars("BTCUSDT", "1h", "2025-01-01", "2025-01-03")


def klines(bars: pd.DataFrame, scale: int = 1) -> list[list]:
    "Rows of Binance's twelve columns, without a header."
    rows = zip(times_of(bars), bars.to_numpy().tolist())
    return [[int(t) * scale, *v, (int(t) + HOUR) * scale - 1, 1.0, 1, 1.0, 1.0, 0] for t, v in rows]


def save(path: Path, rows: list[list]) -> Path:
    path.write_text("\n".join(",".join(map(str, r)) for r in rows) + "\n")
    return path


def swapped(rows):
    rows[4], rows[5] = rows[5], rows[4]
    return rows


def cell(i: int, j: int, value):
    def change(rows):
        rows[i][j] = value
        return rows
    return change


def mixed(rows):
    for r in rows[24:]:
        r[0], r[6] = r[0] * 1000, (r[6] + 1) * 1000 - 1
    return rows


BAD = {
    "duplicate time": (lambda rows: rows[:5] + [rows[4]] + rows[5:], "row 6 (2025-01-01T04:00:00Z) repeats the time of the row before; remove the duplicate"),
    "unsorted": (swapped, "row 6 (2025-01-01T04:00:00Z) is earlier than the row before; sort the rows"),
    "missing column": (lambda rows: [r[:5] for r in rows], "5 columns without a header; add one"),
    "NaN": (cell(7, 4, ""), "row 8 (2025-01-01T07:00:00Z) has a missing or infinite value; remove"),
    "infinite": (cell(7, 5, "inf"), "row 8 (2025-01-01T07:00:00Z) has a missing or infinite value"),
    "negative price": (cell(3, 3, -1.0), "row 4 (2025-01-01T03:00:00Z) has a price that is zero or negative"),
    "high below low": (cell(3, 2, 1.0), "row 4 (2025-01-01T03:00:00Z) has high < low; fetch the row again"),
    "negative volume": (cell(9, 5, -3.0), "row 10 (2025-01-01T09:00:00Z) has a negative volume"),
    "mixed units": (mixed, "row 25 has its time in us and the rows before in ms; split the file"),
    "unfinished last bar": (lambda rows: rows[:-1] + [rows[-1][:6] + [rows[-1][0] + 60_000] + rows[-1][7:]], "row 48 is an unfinished bar; drop it"),
    "off the grid": (lambda rows: [[r[0] + 1, *r[1:]] for r in rows], "row 1 (2025-01-01T00:00:00.001Z) does not start on the 1h grid"),
    "no number": (cell(2, 1, "abc"), "row 3 has open 'abc', which is no number"),
    "no date": (cell(2, 0, 17), "row 3 has the time 17, which is no date from 2009 to 2100"),
    "no time": (cell(2, 0, ""), "row 3 has no time"),
    "a column too many": (cell(2, 11, "0,9"), "row 3 has 13 columns instead of 12"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_csv(what, bars, tmp_path):
    spoil, says = BAD[what]
    path = save(tmp_path / "BTCUSDT-1h.csv", spoil(klines(bars)))
    with pytest.raises(BadData) as e:
        import_file(path, Lake())
    assert e.value.exit_code == 65 and says in str(e.value) and str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert not home().joinpath("data").exists(), "something was written"


def test_interval_that_does_not_fit(bars, tmp_path):
    path = save(tmp_path / "BTCUSDT-5m.csv", klines(bars))
    with pytest.raises(BadData, match="60 minutes after the row before, not 5m; give the interval"):
        import_file(path, Lake())
    with pytest.raises(BadData, match="does not start on the 4h grid"):
        import_file(path, Lake(), interval="4h")
    with pytest.raises(UsageError, match="interval '1x' is not understood"):
        import_file(path, Lake(), interval="1x")


def test_bar_of_the_running_hour_is_unfinished(tmp_path):
    now = floor_ms(RealClock().now_ms(), "1h")
    bars = bars_from_arrays([now - HOUR, now], *[[1.0, 1.0]] * 5)
    bars.to_csv(path := tmp_path / "BTCUSDT-1h.csv")
    with pytest.raises(BadData, match="row 3 .* is an unfinished bar; drop it, or import again after its close"):
        import_file(path, Lake())


def test_missing_named_column(bars, tmp_path):
    bars.drop(columns="low").to_csv(path := tmp_path / "BTCUSDT-1h.csv")
    with pytest.raises(BadData, match="column low is missing; a candle file needs open_time, open, high, low, close, volume"):
        import_file(path, Lake())


@pytest.mark.parametrize("kind", ["parquet", "zip"])
def test_damaged_container(kind, bars, tmp_path):
    path = tmp_path / f"BTCUSDT-1h.{kind}"
    if kind == "parquet":
        bars.reset_index().to_parquet(path)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.write(save(tmp_path / "x.csv", klines(bars)), "x.csv")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadData, match=f"BTCUSDT-1h.{kind}: .*download"):
        import_file(path, Lake())


def test_parquet_contract_names_the_row(bars, tmp_path):
    bars.iloc[[0, 1, 1]].reset_index().to_parquet(path := tmp_path / "BTCUSDT-1h.parquet")
    with pytest.raises(BadData, match="row 3 .*repeats the time"):
        import_file(path, Lake())


def test_one_bad_file_among_many_imports_none(bars, tmp_path):
    good = save(tmp_path / "ETHUSDT-1h.csv", klines(bars))
    bad = save(tmp_path / "BTCUSDT-1h.csv", swapped(klines(bars)))
    with pytest.raises(BadData, match="BTCUSDT-1h.csv: row 6"):
        import_files([good, bad], Lake())
    assert Lake().symbols("1h") == []


def test_stored_bars_are_not_overwritten(bars, tmp_path):
    lake, path = Lake(), tmp_path / "BTCUSDT-1h.csv"
    import_file(save(path, klines(bars)), lake)
    before = lake.manifest_id(["BTCUSDT"], "1h")
    with pytest.raises(BadData, match="BTCUSDT 1h bar 2025-01-01T09:00:00Z has volume 5.0, the lake has .*--replace"):
        import_file(save(path, cell(9, 5, 5.0)(klines(bars))), lake)
    assert lake.manifest_id(["BTCUSDT"], "1h") == before
    assert import_file(path, lake, replace=True).replaced == 1
    assert lake.manifest_id(["BTCUSDT"], "1h") != before


def test_milliseconds_and_microseconds_join(tmp_path):
    bars, lake = synth_bars("BTCUSDT", "1h", "2024-12-01", "2025-02-01"), Lake()
    save(tmp_path / "BTCUSDT-1h-2024-12.csv", klines(bars[:"2024-12-31"]))
    save(tmp_path / "BTCUSDT-1h-2025-01.csv", klines(bars["2025-01-01":], scale=1000))
    assert [r.unit for r in import_files(sorted(tmp_path.glob("*.csv")), lake)] == ["ms", "us"]
    pd.testing.assert_frame_equal(lake.read("BTCUSDT", "1h"), bars)


def test_a_disk_that_refuses(bars, tmp_path, monkeypatch):
    lake = Lake(tmp_path / "lake")
    lake.write("BTCUSDT", "1h", bars[:"2025-01-01"], "first")
    before = lake.manifest_id(["BTCUSDT"], "1h")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left on device; free the disk"):
        lake.write("BTCUSDT", "1h", bars, "second")
    monkeypatch.undo()
    assert lake.manifest_id(["BTCUSDT"], "1h") == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as e:
        Lake(tmp_path / "file").write("BTCUSDT", "1h", bars, "third")
    assert e.value.exit_code == 75


@pytest.mark.parametrize("ask, says, code", [
    (lambda lake: lake.read("BTCUSTD", "1h"), "did you mean BTCUSDT", 65),
    (lambda lake: lake.read("BTCUSDT", "1h", "2025-01-02", "2025-01-01"), "is empty; FROM must be before TO", 2),
    (lambda lake: lake.read("BTCUSDT", "1h", "2025-02-01", "2025-03-01"), "it holds 2025-01-01T00:00:00Z to 2025-01-03T00:00:00Z", 65),
    (lambda lake: lake.read("BTCUSDT", "7q"), "interval '7q' is not understood", 2),
    (lambda lake: lake.write("BTC USDT!", "1h", None, "x"), "is not a symbol; write BTCUSDT", 2),
])
def test_ranges_and_names(ask, says, code, bars):
    lake = Lake()
    lake.write("BTCUSDT", "1h", bars, "synth")
    with pytest.raises(BnmlError) as e:
        ask(lake)
    assert says in str(e.value) and e.value.exit_code == code
