"Runs the migrations on the connection that `trade.tables.upgrade` hands in."
from alembic import context

from bnml.trade.tables import META

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=META, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
