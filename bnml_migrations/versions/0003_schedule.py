"""What is done by the clock: jobs since when they stand in the schedule, and what became of each of their runs"""
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def key(name, kind=sa.Text):
    return sa.Column(name, kind, primary_key=True)


def text(name, null=False):
    return sa.Column(name, sa.Text, nullable=null)


def ms(name, null=False):
    return sa.Column(name, sa.BigInteger, nullable=null)


def upgrade():
    op.create_table("jobs", key("job"), text("cron"), ms("since_ms"))
    op.create_table("job_runs", key("job"), key("due_ms", sa.BigInteger), key("attempt", sa.Integer), text("how"), text("status"), text("why"), text("host"),
                    ms("pid", True), ms("started_ms", True), ms("ended_ms", True), sa.Column("exit_code", sa.Integer), text("output", True))


def downgrade():
    for name in ("job_runs", "jobs"):
        op.drop_table(name)
