"""Processes of their own without reading every library anew: one process per test worker has read them all and forks whoever is asked for. What runs is the same;
only what a process imports, or how long its start takes, can't be told from it: such a claim needs `subprocess`."""
import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

LIBRARIES = ("numpy", "pandas", "pyarrow.parquet", "duckdb", "numba", "pydantic", "pydantic_settings", "yaml", "typer", "structlog", "sqlalchemy.dialects.sqlite", "psycopg",
             "onnxruntime", "onnx", "skl2onnx", "onnxmltools", "sklearn.ensemble", "sklearn.linear_model", "sklearn.neural_network", "sklearn.isotonic", "lightgbm", "xgboost",
             "optuna", "scipy.stats", "cryptography.fernet", "ccxt", "fastapi", "uvicorn")
OURS = ("bnml.ops.desk", "bnml.ops.audits", "bnml.ml.train", "bnml.venue.ccxt", "bnml.venue.orders", "bnml.venue.rehearsal")  # what a command reads first; a program of the test's own (`-c`, a file) may mean to change it before it is read


class Child:
    "What `subprocess.Popen` would give, with pipes of text."
    def __init__(self, link, pid: int, out: int, err: int):
        self._link, self.pid, self.returncode = link, pid, None
        self.stdout, self.stderr = open(out), open(err)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._link.settimeout(None)
            try: self._hear(socket.MSG_DONTWAIT)
            except BlockingIOError: pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._link.settimeout(timeout)
            try: self._hear()
            except TimeoutError: raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
        return self.returncode

    def _hear(self, flags: int = 0):
        self.returncode = int(self._link.recv(64, flags) or b"-9")
        self._link.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        read = {}
        ears = [threading.Thread(target=lambda n=n, f=f: read.update({n: f.read()}), daemon=True) for n, f in (("out", self.stdout), ("err", self.stderr)) if not f.closed]
        for ear in ears: ear.start()
        try: self.wait(timeout)
        except subprocess.TimeoutExpired as e:
            self.send_signal(signal.SIGUSR1)  # where is it?
            time.sleep(0.5)
            self.kill()
            for ear in ears: ear.join(5)
            e.add_note(f"{read.get('out', '')[-2000:]}\n{read.get('err', '')[-6000:]}")
            raise
        for ear in ears: ear.join(timeout)
        self.stdout.close(), self.stderr.close()
        return read.get("out", ""), read.get("err", "")

    def send_signal(self, number: int):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)
    def terminate(self): self.send_signal(signal.SIGTERM)


@functools.cache
def _nursery(*more: str) -> socket.socket:
    "The end of a line to the process that forks; it leaves when the line is cut."
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, "-m", "tests.nursery", str(theirs.fileno()), *more], pass_fds=[theirs.fileno()], cwd=os.path.dirname(os.path.dirname(__file__)),
                     env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    theirs.close()
    return mine


def branch():
    "In a process of the nursery's: from here on it forks for itself, with what it has read."
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        mine.close()
        main(theirs.detach())
        os._exit(0)
    theirs.close()
    globals()["_nursery"] = lambda *_: mine


def start(*words: str, env=None, cwd=None, start_new_session: bool = False, more: tuple[str, ...] = ()) -> Child:
    "As `Popen([sys.executable, *words])`: `-c CODE …`, `-m MODULE …` or `FILE …`. With `more`, of a process that has read these modules too."
    if words[0] == "-m": more = (*OURS, *more)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    asked = dict(words=[str(w) for w in words], env=dict(os.environ if env is None else env), cwd=str(cwd or os.getcwd()), alone=start_new_session)
    socket.send_fds(_nursery(*more), [json.dumps(asked).encode()], [theirs.fileno(), to_out, to_err])
    theirs.close(), os.close(to_out), os.close(to_err)
    return Child(mine, int(mine.recv(64)), out, err)


def kernel(cmd, env, cwd=None, more: tuple[str, ...] = (), **_) -> Child:
    "As `jupyter_client` would launch a notebook's kernel; nobody hears what it says."
    assert cmd[0] == sys.executable
    child = start(*cmd[1:], env=env, cwd=cwd, start_new_session=True, more=more)
    while os.getpgid(child.pid) != child.pid: time.sleep(0.01)  # a kernel is ended together with its group, which must be its own
    for pipe in (child.stdout, child.stderr): threading.Thread(target=pipe.read, daemon=True).start()
    child.stdin = child.stdout = child.stderr = None
    return child


def run(*words: str, env=None, cwd=None, timeout: float = 300, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    "As `subprocess.run([sys.executable, *words], capture_output=True, text=True)`."
    child = start(*words, env=env, cwd=cwd, more=more)
    out, err = child.communicate(timeout)
    return subprocess.CompletedProcess(words, child.returncode, out, err)


# ---- the other side

def _body(words):
    "Run as Python would have been called."
    kind, rest = words[0], words[1:]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = type(sys)("__main__")
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")


def _live(asked, out: int, err: int):
    "In the child: take its place, run, and end as a process ends."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if asked["alone"]: os.setsid()
    for fd, place in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)): os.dup2(fd, place); os.close(fd)
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.path[1:1] = [place for place in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if place]
    os.chdir(asked["cwd"])
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)  # asked when it does not end
    code = 0
    try: _body(asked["words"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if code == 1 and not isinstance(e.code, int): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code & 255)


def _keep(asked, link: int, out: int, err: int):
    "Between the two: says the child's number and how it ended."
    line = socket.socket(fileno=link)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        line.close()
        _live(asked, out, err)
    os.close(out), os.close(err)
    line.send(str(child).encode())
    line.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def main(fd: int, *more: str):
    for name in (*LIBRARIES, *more):
        with contextlib.suppress(ImportError): importlib.import_module(name)  # an extra that is not installed here
    gc.freeze()  # a child leaves these pages alone
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    line = socket.socket(fileno=fd)
    while True:
        said, fds, _, _ = socket.recv_fds(line, 1 << 20, 3)
        if not said: return
        if not os.fork():
            line.close()
            _keep(json.loads(said), *fds)
        for each in fds: os.close(each)


if __name__ == "__main__": main(int(sys.argv[1]), *sys.argv[2:])
