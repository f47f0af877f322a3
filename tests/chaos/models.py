"""What is written and read back: counters that only grow, each with some slots."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

ROWS = 200
SLOTS = 3


class Base(DeclarativeBase):
    pass


class Counter(Base):
    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)

    slots: Mapped[list[Slot]] = relationship(order_by="Slot.number")


class Slot(Base):
    __tablename__ = "slot"

    counter_id: Mapped[int] = mapped_column(ForeignKey("counter.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)
