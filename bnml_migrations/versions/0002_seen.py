"""What a verdict was given on: the market as it was seen, as JSON"""
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.add_column("verdicts", sa.Column("seen", sa.Text, nullable=True))


def downgrade():
    op.drop_column("verdicts", "seen")
