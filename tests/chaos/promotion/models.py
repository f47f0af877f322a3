"""What is written: one row a write, which the server itself stamps with its name and its reign."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from .history import Stamp


class Base(DeclarativeBase):
    pass


class Written(Base):
    """A write. The server makes the key, so that what is sent twice is stored twice."""

    __tablename__ = "written"

    key: Mapped[uuid.UUID] = mapped_column(
        primary_key=True, server_default=sa.func.gen_random_uuid()
    )
    writer: Mapped[str] = mapped_column(sa.Text)
    number: Mapped[int] = mapped_column(sa.BigInteger)
    node: Mapped[str] = mapped_column(sa.Text, server_default="")
    epoch: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    timeline: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (sa.Index("written_by", "writer", "number"),)


STRANGER = "stranger"
"""A role without rights beyond its writes: no superuser passes a fence by mistake."""

STAMPS = f"""
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    NEW.node := current_setting('cluster_name');
    NEW.epoch := (SELECT epoch FROM sqlroute.shard);
    NEW.timeline := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int;
    RETURN NEW;
END $$;
CREATE TRIGGER stamped BEFORE INSERT ON written FOR EACH ROW EXECUTE FUNCTION stamp();
CREATE ROLE {STRANGER} LOGIN PASSWORD '{STRANGER}';
GRANT SELECT, INSERT ON written TO {STRANGER};
"""

INSERT = "INSERT INTO written (writer, number) VALUES (%s, %s) RETURNING node, epoch, timeline"
"""As a client sends it that knows nothing of sqlroute."""


def write(session: Session, writer: str, number: int) -> tuple[Stamp, int, str]:
    """Write one row and commit; return its stamp, the position of the commit and the token."""
    insert = sa.insert(Written).values(writer=writer, number=number)
    found = session.execute(insert.returning(Written.node, Written.epoch, Written.timeline)).one()
    session.commit()
    token = session.token  # type: ignore[attr-defined]
    (position,) = token.positions
    return Stamp(*found), position.lsn, str(token)


def newest(session: Session, writer: str) -> int:
    """Return the newest number that a writer has written, 0 for none."""
    query = sa.select(sa.func.coalesce(sa.func.max(Written.number), 0))
    return int(session.scalar(query.where(Written.writer == writer)) or 0)
