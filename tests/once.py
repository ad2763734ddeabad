"What every run would read or compile anew although it is always the same: once for a file of tests."
from functools import lru_cache

import pytest

from bnml.domain import signal
from bnml.trade import ledger


@pytest.fixture(autouse=True, scope="module")
def once():
    "The source of a strategy's class, which its version is made of, and the text of a ledger's statements."
    real, texts = ledger.statements, {}

    def statements(conn):
        if conn.dialect.name not in texts: texts[conn.dialect.name] = real(conn)
        return texts[conn.dialect.name]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "_code", lru_cache(None)(signal._code))
        m.setattr(ledger, "statements", statements)
        yield
