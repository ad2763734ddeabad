"A kernel can't be robbed of its way to be spoken to between the choice of a port and the taking of it."
import json
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("jupyter_client")
from jupyter_client import KernelManager  # noqa: E402

from bnml.ops.report import over_sockets  # noqa: E402

ROBBED = """
import json, os, socket, sys
told = json.load(open(sys.argv[-1]))
if told["transport"] == "tcp":
    rival = socket.socket(); rival.bind((told["ip"], told["iopub_port"])); rival.listen()
from ipykernel import kernelapp
try: kernelapp.launch_new_instance(argv=["-f", sys.argv[-1], "--log-level=50"])
except BaseException: os._exit(1)  # else it hangs, its sockets half open
"""


@pytest.fixture
def robbed(tmp_path, monkeypatch):
    "A kernel that finds one of its TCP ports taken by somebody else."
    spec = tmp_path / "kernels" / "robbed"
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": [sys.executable, "-c", ROBBED, "{connection_file}"], "display_name": "robbed", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return "robbed"


def answer(manager, kernel: str) -> str:
    "What a kernel answers to a sum; raises RuntimeError when it is dead."
    manager = manager(kernel_name=kernel)
    manager.start_kernel()
    client, heard = manager.client(), []
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive("print(40 + 2)", output_hook=lambda m: heard.append(m["content"].get("text", "")), timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(heard).strip()


def test_a_rival_kills_a_kernel_on_ports(robbed):
    with pytest.raises(RuntimeError, match="Kernel died"):
        answer(KernelManager, robbed)


def test_a_kernel_on_sockets_has_no_rival(robbed):
    with tempfile.TemporaryDirectory() as folder:  # a short name: a socket's has 107 bytes at most
        assert answer(over_sockets(KernelManager, folder), robbed) == "42"
        assert [p.name for p in Path(folder).glob("bnml-*/*")] == [], "its sockets and its file are gone with it"
