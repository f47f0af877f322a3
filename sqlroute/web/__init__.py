"""What a client has seen travels with its requests; each request has one session.

The middlewares are in :mod:`sqlroute.web.asgi` (Starlette, FastAPI, Litestar, Quart) and
:mod:`sqlroute.web.wsgi` (Flask and others). Needs the extra ``sqlroute[web]``.
"""

from __future__ import annotations

from sqlroute.web.carriage import Cookie, Header
from sqlroute.web.exchange import adopt, session_of

__all__ = ["Cookie", "Header", "adopt", "session_of"]
