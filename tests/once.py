"What every run would read or compile anew although it is always the same: once for a file of tests."
from functools import lru_cache

import pytest
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite as Sqlite

from bnml.domain import signal
from bnml.trade import ledger


@pytest.fixture(autouse=True, scope="module")
def once():
    "The source of a strategy's class, which its version is made of, and the text of a ledger's statements: one SQLite speaks like the other."
    real, connect, texts, compiled = ledger.statements, ledger.connect, {}, {}

    def statements(conn):
        if conn.dialect.name not in texts: texts[conn.dialect.name] = real(conn)
        return texts[conn.dialect.name]

    def connected(*args, **kw):
        conn = connect(*args, **kw)
        return conn.execution_options(compiled_cache=compiled) if conn.dialect.name == "sqlite" else conn

    with pytest.MonkeyPatch.context() as m:
        m.setattr(signal, "_code", lru_cache(None)(signal._code))
        m.setattr(ledger, "statements", statements)
        m.setattr(ledger, "connect", connected)
        m.setattr(Sqlite, "__hash__", lambda self: hash((type(self), self.paramstyle)))
        m.setattr(Sqlite, "__eq__", lambda self, other: type(self) is type(other) and self.paramstyle == other.paramstyle)
        yield
