"""Waiting for something another process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def became_true(condition: Callable[[], bool], *, timeout: float, every: float = 0.01) -> bool:
    """Ask until the condition holds; False when it still does not after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every)
    return True
