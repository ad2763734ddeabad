"The ledger's migrations; Alembic finds them by `script_location = bnml_migrations:`."
