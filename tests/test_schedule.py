"The schedule with real processes and a real clock: what is killed is noted and run again once, two schedules are one too many, and nothing outlives its time."
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from bnml.cli import main
from bnml.core.base import source
from bnml.core.clock import RealClock
from bnml.ops.apart import mark, offspring
from bnml.ops.jobs import FLAGS, check_job, command, words
from bnml.ops.runs import Run, Runs
from bnml.ops.schedule import Schedule
from bnml.ops.settings import JobSettings, load_settings
from bnml.trade.ledger import Ledger
from bnml.trade.tables import upgrade
from tests import nursery
from tests.shell import here
from tests.test_help import parses

MINUTE, DAY = 60_000, 86_400_000
# every job of the schedule gets stuck before it begins, with a child in a session of its own, as a notebook's kernel is
STUCK = """
import os, subprocess, sys, time
if os.environ.get("BNML_JOB") and not os.environ.get("STUCK_CHILD"):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True, env=os.environ | {"STUCK_CHILD": "1"})
    time.sleep(float(os.environ["STUCK_S"]))
"""


def now_ms() -> int: return time.time_ns() // 1_000_000


def daily(ms: int) -> str:
    "A cron line that came at that minute, and comes again in a day."
    t = datetime.fromtimestamp(ms / 1000, UTC)
    return f"{t.minute} {t.hour} * * *"


@pytest.fixture
def just_now(own_home) -> int:
    "A job that was due a minute ago, by a schedule that has stood for longer; its moment."
    due = now_ms() // MINUTE * MINUTE - MINUTE
    write(own_home, cron=daily(due))
    Runs().since("copy", daily(due), due - 2 * MINUTE)
    return due


def write(home, cron: str = "0 0 1 1 *", more: str = "", **settings):
    "The settings: one job that copies the ledger."
    lines = [f"  {k}: {v}" for k, v in ({"stop_s": 0.3} | settings).items()]
    (home / "bot.yaml").write_text("\n".join(["schedule:", f'  jobs: [{{name: copy, cron: "{cron}", do: backup{more}}}]', *lines]) + "\n")


@pytest.fixture
def stuck(own_home):
    "The environment in which jobs get stuck."
    (own_home / "hooks").mkdir()
    (own_home / "hooks" / "sitecustomize.py").write_text(STUCK)
    yield {**os.environ, "PYTHONPATH": str(own_home / "hooks"), "STUCK_S": "120"}
    for run in Runs().of():
        for pid in offspring(mark(run.job, run.due_ms, run.attempt)):
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)


@contextmanager
def keeping(*flags, env=None):
    "A schedule in a process of its own."
    child = nursery.start("-m", "bnml.cli", "schedule", *flags, env=env)
    try: yield child
    finally:
        child.kill()
        child.wait(10)


def wait_for(seen, seconds: float = 30):
    "What `seen` says, as soon as it says something."
    end = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < end: time.sleep(0.02)
    assert found, "it did not come to that in time"
    return found


def family(due: int) -> list[int]:
    "The stuck job and its child, once both are there."
    found = offspring(mark("copy", due))
    return found if len(found) == 2 else []


def story() -> list[tuple]: return [(r.attempt, r.how, r.status, r.exit_code) for r in Runs().of("copy")]


def test_a_scheduler_killed_in_a_job_is_followed_by_one_that_ends_it_and_runs_it_once_more(own_home, just_now, stuck):
    with keeping(env=stuck) as first:
        left = wait_for(lambda: family(just_now))
        assert story() == [(1, "late", "running", None)]
        first.kill()                                                # 9
        assert first.wait(10) == -9 and offspring(mark("copy", just_now)) == left      # nobody told them
    code, out, err = here(["schedule", "--once", "--json"], own_home)
    assert code == 0, err
    assert offspring(mark("copy", just_now)) == []
    assert story() == [(1, "late", "interrupted", None), (2, "again", "done", 0)]
    assert "2 of its processes were ended" in Runs().of("copy")[0].why
    [row] = json.loads(out)
    assert (row["how"], row["status"]) == ("again", "done") and "ledger-" in open(row["output"]).read()
    assert len(list((own_home / "data" / "backups").glob("*.db"))) == 1
    assert json.loads(here(["schedule", "--once", "--json"], own_home)[1]) == []     # not lost, and not doubled
    assert len(story()) == 2


def test_a_job_that_kills_twice_is_left_alone(own_home, just_now):
    Runs().begin(Run("copy", just_now, 1, status="interrupted"))
    Runs().begin(Run("copy", just_now, 2, how="again", status="running", host=os.uname().nodename))
    assert main(["schedule", "--once"]) == 0
    assert [s[2] for s in story()] == ["interrupted", "interrupted"]


def test_a_second_schedule_is_refused_a_second_job_waits_and_the_first_ends_when_it_is_told_to(own_home, just_now, stuck):
    with keeping("--json", env=stuck) as first:
        wait_for(lambda: family(just_now))
        second, by_hand = (nursery.start("-m", "bnml.cli", "schedule", *words) for words in ((), ("run", "copy")))  # both are patient for two seconds
        (out, err), code = second.communicate(30), second.returncode
        assert (code, out) == (77, "") and f"another schedule is at work on this ledger (process {first.pid} on " in err and "stop it first" in err and "Traceback" not in err
        (_, err), code = by_hand.communicate(30), by_hand.returncode
        assert code == 75 and "another job is at work on this ledger" in err and "`bnml schedule list` says which" in err
        assert json.loads(here(["schedule", "list", "--json"], own_home)[1])[0]["status"] == "running"
        begun = time.monotonic()
        first.terminate()                                           # stop_s is 0.3
        assert first.wait(10) == 0 and time.monotonic() - begun < 3
        [row] = json.loads(first.stdout.read())
        assert (row["status"], row["exit_code"]) == ("stopped", -9)
    assert offspring(mark("copy", just_now)) == [] and story() == [(1, "late", "stopped", -9)]
    [row] = json.loads(here(["schedule", "list", "--json"], own_home)[1])
    assert row["status"] == "stopped" and "schedule.stop_s" in row["why"] and row["next"] > row["last"]


def test_a_job_that_is_nearly_done_may_finish(own_home, just_now, stuck):
    write(own_home, cron=daily(just_now), stop_s=30)
    with keeping(env=stuck | {"STUCK_S": "1"}) as first:
        wait_for(lambda: family(just_now))
        first.terminate()
        assert first.wait(30) == 0
    assert story() == [(1, "late", "done", 0)] and offspring(mark("copy", just_now)) == []


def test_over_its_time_a_job_is_killed_with_all_that_it_has_started(own_home, stuck):
    write(own_home, more=", limit_s: 1.5")
    code, out, err = here(["schedule", "run", "copy"], own_home, env=stuck)
    [run] = Runs().of("copy")
    assert code == 75 and "copy killed (not done after 1.5 s (limit_s))" in err, err
    assert (run.status, run.exit_code) == ("killed", -9) and 1.5 <= run.seconds < 5 and offspring(mark("copy", run.due_ms)) == []


def test_what_was_missed_is_run_late_once_or_noted(own_home):
    due = now_ms() // MINUTE * MINUTE - 120 * MINUTE
    write(own_home, cron=daily(due), grace_s=600)
    Runs().since("copy", daily(due), due - 3 * DAY + MINUTE)        # three moments ago
    assert json.loads(here(["schedule", "--once", "--json"], own_home)[1]) == []
    [missed] = Runs().of("copy")
    assert missed.status == "missed" and missed.due_ms == due - 2 * DAY and missed.why.startswith("3 runs were due until ")
    write(own_home, cron=daily(due + MINUTE), grace_s=86_400)       # another line: nothing is owed from before it was written
    assert json.loads(here(["schedule", "--once", "--json"], own_home)[1]) == []
    Runs().moved("copy", due - 2 * DAY)
    [row] = json.loads(here(["schedule", "--once", "--json"], own_home)[1])
    assert (row["how"], row["status"]) == ("late", "done")
    assert [s[2] for s in story()] == ["missed", "missed", "done"]


class Quick(Schedule):
    "The scheduler in a thread of this process; its job says a word."
    def command(self, job): return [sys.executable, "-S", "-c", "print('done')"]


@contextmanager
def quick(clock=None):
    keeper = Quick(load_settings(), clock=clock)
    thread = threading.Thread(target=keeper.keep)
    thread.start()
    try: yield keeper
    finally:
        keeper.stop()
        thread.join(10)
        assert not thread.is_alive()


class NearTheTurn(RealClock):
    "The wall clock, set so that the minute turns in a second."
    def __init__(self):
        super().__init__()
        self.ahead = 59_000 - now_ms() % MINUTE

    def now_ms(self): return super().now_ms() + self.ahead


def test_it_comes_by_the_clock(own_home):
    write(own_home, cron="* * * * *")
    with quick(NearTheTurn()):
        wait_for(lambda: [s for s in story() if s[2] == "done"])
    [run] = Runs().of("copy")
    assert story() == [(1, "clock", "done", 0)] and run.due_ms % MINUTE == 0 and 0 <= run.started_ms - run.due_ms < 3000
    assert open(run.output).read() == "done\n"


def test_a_failing_job_says_so_with_its_own_exit_code(own_home, just_now):
    (own_home / "bot.yaml").write_text(f'schedule: {{jobs: [{{name: day, cron: "{daily(just_now)}", do: summary, params: {{day: "2025-03-01T05:00:00Z"}}}}]}}\n')
    Runs().since("day", daily(just_now), just_now - MINUTE)
    code, _, err = here(["schedule", "--once"], own_home)
    assert code == 2 and "day failed with exit code 2; see " in err
    [run] = Runs().of("day")
    assert "is no day; write 2025-03-01" in open(run.output).read() and (run.status, run.exit_code) == ("failed", 2)


VALUES = {"symbols": "BTCUSDT", "interval": "1h", "from": "2025-03-01", "to": "2025-04-01", "keep": 3, "day": "2025-03-01"}


@pytest.mark.parametrize("do", FLAGS)
def test_what_a_job_says_is_a_command_with_those_flags(do):
    job = JobSettings(name="x", cron="@daily", do=do, params={flag: VALUES[flag] for flag in FLAGS[do]})
    check_job(job)
    assert parses(words(job)).name == words(job)[1 if do in ("fetch", "backup") else 0]
    assert command(job, None)[3:] == words(job)


def test_every_template_is_a_command():
    for path in sorted((source() / "nbs" / "reports").glob("*.ipynb")):
        job = JobSettings(name="x", cron="@daily", do="report", template=path.stem)
        check_job(job)
        assert parses([*words(job), "--config", "bot.yaml"]).name == path.stem.replace("_", "-")


def test_an_older_ledger_gets_the_tables_and_keeps_its_rows(own_home):
    url = f"sqlite:///{own_home}/old.db"
    old = sa.create_engine(url).connect()
    upgrade(old, "0002")
    old.exec_driver_sql("INSERT INTO equity VALUES ('paper', 1000, 10000.5)")
    old.commit()
    old.engine.dispose()
    assert Runs(url).of() == []
    with Ledger(url, "paper") as ledger: assert ledger.equity() == ([1000], [10000.5])


@pytest.mark.parametrize("job, code, said", [
    ('{name: copy, cron: "61 * * * *", do: backup}', 78, "schedule.jobs.0.cron: cron line '61 * * * *' is wrong"),
    ('{name: copy, cron: "@daily", do: report, template: tranding}', 78, "schedule.jobs, copy: there is no report 'tranding'; choose one of "),
    ('{name: copy, cron: "@daily", do: report, template: backtest, params: {rundir: x}}', 78, "report backtest has no parameter 'rundir'; it takes "),
    ('{name: copy, cron: "@daily", do: sell}', 78, "schedule.jobs.0.do: input should be 'report', 'retrain', 'backup', 'fetch' or 'summary'"),
    ('{name: copy, cron: "@daily", do: backup, limit: 3}', 78, "schedule.jobs.0.limit: extra inputs are not permitted"),
    ('{name: other, cron: "@daily", do: backup}', 2, "there is no job 'copy'; the schedule has other"),
    ("", 78, "schedule.jobs is empty, so there is nothing to start"),
])
def test_a_slip_is_one_sentence(own_home, capsys, job, code, said):
    (own_home / "bot.yaml").write_text(f"schedule: {{jobs: [{job}]}}\n")
    assert main(["schedule", "run", "copy"]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert Runs().of() == []
    assert main(["config", "check"]) == (code if job and code == 78 else 0)


def test_a_ledger_that_is_locked_is_asked_again(own_home, just_now):
    "A trader holds the ledger while a job is due: nothing starts, and nothing is lost."
    with Ledger(session="x") as ledger: ledger.save_state("n", 1)
    other = sqlite3.connect(own_home / "data/state/ledger.db")
    other.execute("BEGIN IMMEDIATE")
    with quick():
        time.sleep(1)
        assert story_of(other) == []
        other.rollback()
        wait_for(lambda: [s for s in story() if s[2] == "done"])
    assert story() == [(1, "late", "done", 0)]


def story_of(conn) -> list: return conn.execute("SELECT * FROM job_runs").fetchall()
