"""Sessions, intents, orders, fills, verdicts, equity and state"""
import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def key(name, kind=sa.Text):
    return sa.Column(name, kind, primary_key=True)


def text(name, null=False):
    return sa.Column(name, sa.Text, nullable=null)


def ms(name, null=False):
    return sa.Column(name, sa.BigInteger, nullable=null)


def flag(name):
    return sa.Column(name, sa.Boolean, nullable=False)


def number(name):
    return sa.Column(name, sa.Float)


def upgrade():
    op.create_table("sessions", key("id"), text("mode"), text("source"), text("strategy"), text("code_version"), text("settings"),
                    text("balances"), ms("started_ms"), ms("ended_ms", True))
    op.create_table("intents", key("session"), key("client_id"), ms("n"), text("symbol"), text("side"), text("type"), text("quantity"),
                    text("price", True), text("stop_price", True), text("purpose"), text("position_id"), ms("created_ms"),
                    text("reason"), text("group_id", True), flag("limit_ioc"))
    op.create_table("orders", key("session"), key("client_id"), text("status"), text("filled"), text("quote_filled"), ms("updated_ms"),
                    ms("accepted_ms", True), text("reason"))
    op.create_table("fills", key("session"), key("fill_id"), ms("n"), text("client_id"), text("symbol"), text("side"), text("quantity"),
                    text("price"), text("fee"), text("fee_asset"), ms("time_ms"), flag("maker"), text("raw_price", True))
    op.create_table("verdicts", key("session"), key("n", sa.BigInteger), text("proposal_id"), text("symbol"), ms("time_ms"), flag("allowed"),
                    text("reasons"), text("quantity"), text("detail"), text("requested", True), text("price", True), number("confidence"),
                    number("atr"), number("stop"), number("spread_bps"), number("score"))
    op.create_table("equity", key("session"), key("time_ms", sa.BigInteger), sa.Column("equity", sa.Float, nullable=False))
    op.create_table("state", key("session"), key("key"), text("value"))


def downgrade():
    for name in ("state", "equity", "verdicts", "fills", "orders", "intents", "sessions"):
        op.drop_table(name)
