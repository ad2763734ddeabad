"Keys as an operator meets them: the doctor, the keys' check, the encrypted file and the guard, each as it is called; no value is ever shown."
import json
import subprocess
import sys

import pytest

from bnml.cli import main
from bnml.core.secrets import SECRETS
from bnml.venue.gate import Key
from tests.test_live import KEYS, SYMBOL, rehearse, settings

PHRASE = "a long passphrase"
HIDDEN = [*KEYS.values(), PHRASE]


@pytest.fixture
def bnml(own_home, monkeypatch, capsys):
    "A command in this process: (exit code, stdout, stderr), without any of the values."
    for name in [n for own, others in SECRETS.items() for n in (own, *others)]: monkeypatch.delenv(name, raising=False)
    def run(*words, **env):
        with monkeypatch.context() as m:
            for name, value in env.items(): m.setenv(name, value)
            m.setattr("bnml.core.vault._opened", {})  # a command is a process of its own
            capsys.readouterr()
            code = main(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in err and not any(v in out + err for v in HIDDEN), (out, err)
        return code, out, err
    return run


@pytest.fixture(scope="module")
def stage():
    with rehearse() as it: yield it


# ---- doctor

def test_the_doctor_is_content_or_says_what_fails(bnml, own_home, stage):
    (own_home / "bot.yaml").write_text(settings(stage, strategy="rules.crossover"))
    code, out, _ = bnml("doctor", "--json", **KEYS)
    found = json.loads(out)["findings"]
    assert code == (77 if any(f["level"] == "fail" for f in found) else 0)
    parts = {f["part"]: f for f in found}
    assert {"mode", "keys", "models", "lake", "disk", "database", "venue", "clock", "lock", "evidence"} <= set(parts)
    assert parts["venue"]["level"] == "ok" and sum(f["part"] == "lock" for f in found) == 10
    code, out, _ = bnml("doctor", "--offline")
    assert code == 0 and "venue" not in out.split() and "PAPER_ONLY=0: not set, so 1" in out
    (own_home / "data/state/ledger.db").write_bytes(b"no database" * 100)
    code, out, _ = bnml("doctor", "--offline", "--json", **KEYS)
    assert code == 77 and [f["part"] for f in json.loads(out)["findings"] if f["level"] == "fail"] == ["database"]


# ---- keys check

@pytest.mark.parametrize("env, may, code, says", [
    (KEYS, {}, 0, "may trade, may not withdraw"),
    (KEYS | {"EXCHANGE_API_KEY": "some key"}, {}, 77, "malformed: it holds blanks"),
    ({"EXCHANGE_API_SECRET": "x" * 20}, {}, 77, "missing EXCHANGE_API_KEY"),
    (KEYS | {"EXCHANGE_API_KEY": "somebody-elses"}, {}, 77, "does not know this key"),
    (KEYS, {"trade": False}, 77, "read-only"), (KEYS, {"withdraw": True}, 77, "the key may withdraw")])
def test_keys_check_at_the_venue(bnml, own_home, stage, env, may, code, says):
    (own_home / "bot.yaml").write_text(settings(stage))
    stage.street.gate.keys[KEYS["EXCHANGE_API_KEY"]] = Key(KEYS["EXCHANGE_API_SECRET"], **may)
    found, out, _ = bnml("keys", "check", "--venue", **env)
    assert (found, says in out) == (code, True), out
    assert stage.books()["orders"] == []


def test_testnet_keys_on_live_are_named(bnml, own_home, stage, monkeypatch):
    "The live venue does not know the key, the test network does."
    (own_home / "bot.yaml").write_text(settings(stage))
    monkeypatch.setattr("bnml.ops.preflight.own_urls", lambda s: None)
    asked = []
    monkeypatch.setattr("bnml.ops.preflight.permissions.__defaults__", (None, lambda s, env, testnet: asked.append(testnet)))
    code, out, _ = bnml("keys", "check", "--venue", EXCHANGE_API_KEY="testnet-key-0123", EXCHANGE_API_SECRET="testnet-secret-4567")
    assert code == 77 and "these are keys of the test network, and exchange.testnet is false" in out and asked == [True]


# ---- the encrypted file

def test_keys_rest_encrypted_and_open_the_lock(bnml, own_home, stage):
    (own_home / "bot.yaml").write_text(settings(stage))
    stage.street.gate.keys[KEYS["EXCHANGE_API_KEY"]] = Key(KEYS["EXCHANGE_API_SECRET"])
    phrase = {"SCALPER_SECRETS_PASSPHRASE": PHRASE}
    assert bnml("secrets", "init", **KEYS)[0] == 78  # no passphrase
    assert bnml("secrets", "init", **KEYS, **phrase)[0] == 0 and bnml("secrets", "init", **KEYS, **phrase)[0] == 78  # it exists
    path = own_home / "secrets.enc"
    assert path.stat().st_mode & 0o777 == 0o600 and not any(v.encode() in path.read_bytes() for v in HIDDEN)
    assert bnml("keys", "check", "--venue", **phrase)[0] == 0 and bnml("keys", "check", "--venue")[0] == 77
    code, out, _ = bnml("secrets", "check", "--json", **phrase)
    assert code == 0 and json.loads(out)["secrets"]["EXCHANGE_API_KEY"] == "file"
    code, out, err = bnml("secrets", "check", BNML_SECRETS_PASSPHRASE="another passphrase")
    assert (code, out, len(err.splitlines())) == (78, "", 1) and "does not open with this passphrase" in err
    code, _, err = bnml("doctor", "--offline", BNML_SECRETS_PASSPHRASE="another passphrase")
    assert code == 78 and "does not open" in err


def test_the_guard_names_file_and_line(bnml, own_home):
    git = lambda *words: subprocess.run(["git", "-C", str(own_home), *words], check=True, capture_output=True)
    git("init", "-q")
    (own_home / "notes.md").write_text(f"# keys\n\nmine is {KEYS['EXCHANGE_API_SECRET']}\n")
    (own_home / "clean.md").write_text("nothing here\n")
    git("add", "clean.md")
    assert bnml("secrets", "guard", "--path", str(own_home), **KEYS)[0] == 0
    git("add", "notes.md")
    code, out, _ = bnml("secrets", "guard", "--path", str(own_home), **KEYS)
    assert (code, out) == (77, "notes.md:3: a secret of this environment\n")
    assert bnml("secrets", "guard", "--path", str(own_home))[0] == 0  # who does not know it can't see it
    assert bnml("secrets", "guard", "--path", "/")[0] == 2
