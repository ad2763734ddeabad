"""What `pytest --nbval-lax -p tests.kernels` starts its kernels with: Unix sockets, since three workers can lose each other's TCP ports; and a second try, since the
start of a kernel isn't what a notebook is tested for."""
import functools
import tempfile
import warnings

import nbval.kernel

from bnml.ops.report import over_sockets

TRIES = 3
SOCKETS = tempfile.TemporaryDirectory()


def again(start):
    "A start that is tried anew, saying why."
    @functools.wraps(start)
    def tried(*args, **kwargs):
        for left in reversed(range(TRIES)):
            try: return start(*args, **kwargs)
            except RuntimeError as e:  # it died, or it didn't answer
                if not left: raise
                warnings.warn(f"a kernel did not start and is started again: {e}", stacklevel=2)
    return tried


nbval.kernel.KernelManager = over_sockets(nbval.kernel.KernelManager, SOCKETS.name)
nbval.kernel.start_new_kernel = again(nbval.kernel.start_new_kernel)
