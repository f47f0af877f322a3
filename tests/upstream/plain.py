"""The pass-through Session of the baseline: what it fails, any subclass of Session fails."""

from __future__ import annotations

from sqlalchemy.orm import Session


class JudgedSession(Session):
    """A Session that changes nothing."""
