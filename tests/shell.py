"Commands, as a shell calls them: in a process of their own, in a forked one, or in this one."
import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib import import_module
from unittest.mock import patch

from bnml.core.base import source
from tests import nursery


def process(words, home, module="bnml.cli", env=None):
    "(exit code, stdout, stderr) of a process of its own."
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=source(),
                          env={**os.environ, "BNML_HOME": str(home), **(env or {})}, timeout=300)
    return done.returncode, done.stdout, done.stderr


def forked(words, home, module="bnml.cli", env=None):
    "The same of a process that has its libraries already."
    done = nursery.run("-m", module, *words, cwd=source(), env={**os.environ, "BNML_HOME": str(home), **(env or {})})
    return done.returncode, done.stdout, done.stderr


def here(words, home, module="bnml.cli", env=None):
    "(exit code, stdout, stderr) of the entry point that such a process calls."
    main, out, err = import_module(module).main, io.StringIO(), io.StringIO()
    with patch.dict(os.environ, {"BNML_HOME": str(home), **(env or {})}), redirect_stdout(out), redirect_stderr(err), chdir(source()):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()
