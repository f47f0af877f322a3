"""What the applications store."""

from __future__ import annotations

import itertools
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NUMBERS = itertools.count(1)


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


def number_of(*sessions: Any) -> str:
    """Return the number of a session, one for each that there ever was; of several, of all."""
    numbers = {session.info.setdefault("number", next(_NUMBERS)) for session in sessions}
    return ", ".join(map(str, numbers))
