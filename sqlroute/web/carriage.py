"""The text in which a client brings back what it has seen: a signed cookie or header.

Values only: nothing here knows a request or a session. Reading never raises; what cannot be trusted
is an answer like any other. Length is looked at before the signature, and the signature before the
token is parsed.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

try:
    from itsdangerous import BadSignature, TimestampSigner
except ImportError as missing:
    raise ImportError(
        "sqlroute.web needs itsdangerous, which is not installed; install sqlroute[web]"
    ) from missing

from sqlroute.errors import ConfigError, InvalidToken
from sqlroute.routing.token import Token

LONGEST = 4000
"""Letters of a signed token. Browsers drop a cookie of more than 4,096 with all its attributes."""

LONGEST_HEADER = 65_536
"""Letters of a whole Cookie header that are searched."""

_STRONG = "*"  # in place of a token; no token looks like it
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_TEXT = re.compile(r"[ -:<-~]*", re.ASCII)
_SAME_SITES = ("Strict", "Lax", "None")
_UNSEEN = Token()


@dataclass(frozen=True, slots=True)
class Brought:
    """What a request brought.

    Attributes:
        token: what its client is known to have seen.
        is_strong: the client has seen more than the token says, and nobody knows what: only the
            primary is sure to have it.
        fault: why what it has sent is not trusted; empty if it is, or if it has sent nothing.
        is_expired: that is the fault. It was ours, once.
    """

    token: Token = _UNSEEN
    is_strong: bool = False
    fault: str = ""
    is_expired: bool = False


NOTHING = Brought()
STRONG = Brought(is_strong=True)


class _Signed:
    """A signed text with a time.

    Args:
        keys: secret texts; the first one signs, all of them verify. To rotate: add the new key as
            the last one everywhere, then move it to the front, then leave out the old one.
        max_age: seconds for which a text is trusted. Longer than any replica that takes reads is
            behind, so longer than ``max_lag``.
        clock: tells the seconds since 1970.

    Raises:
        ConfigError: no key, an empty one, or a time that is none.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        *,
        max_age: int = 60,
        clock: Callable[[], float] = time.time,
    ) -> None:
        keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if not keys or not all(isinstance(key, str) and key for key in keys):
            raise ConfigError(("keys: at least one secret text, and none of them empty",))
        if max_age < 1:
            raise ConfigError((f"max_age: {max_age!r}; it is at least 1 second",))
        self.max_age = int(max_age)
        self._clock = clock
        self._signer = _Signer(keys, clock)

    def read_text(self, text: str) -> Brought:
        """Return what a client has sent back."""
        if len(text) > LONGEST:
            return _refused(f"it has {len(text)} letters, more than {LONGEST}")
        try:
            value, signed_at = self._signer.unsign(text, return_timestamp=True)
        except BadSignature:
            return _refused("its signature is none of ours")
        # a time to come is no fault: it is another server's clock
        if self._clock() - signed_at.timestamp() > self.max_age:
            return _refused(f"it is older than {self.max_age} s", is_expired=True)
        if value == _STRONG.encode():
            return STRONG
        try:
            return Brought(Token.parse(value.decode()))
        except InvalidToken:
            return _refused("what was signed is no token")

    def text_of(self, token: Token) -> str:
        """Return the signed text of a token; of one that is too long, the one for strong reads."""
        text = str(token)
        signed = self._signer.sign(text).decode() if len(text) < LONGEST else ""
        return signed if 0 < len(signed) <= LONGEST else self.text_of_strong()

    def text_of_strong(self) -> str:
        """Return the signed text that says: read from the primary."""
        return self._signer.sign(_STRONG).decode()


class _Signer(TimestampSigner):
    def __init__(self, keys: Sequence[str], clock: Callable[[], float]) -> None:
        # itsdangerous signs with the last key
        super().__init__(
            list(reversed(keys)),
            salt="sqlroute.token",
            key_derivation="hmac",
            digest_method=hashlib.sha256,
        )
        self._clock = clock

    def get_timestamp(self) -> int:
        return int(self._clock())


class Cookie(_Signed):
    """A cookie, for browsers.

    Args:
        keys, max_age, clock: as for any signed text; the browser forgets it after ``max_age``, too.
        name: its name.
        path, domain: to which requests the browser adds it.
        secure: only over HTTPS.
        same_site: ``"Lax"``, ``"Strict"`` or ``"None"``.

    Raises:
        ConfigError: a value that a cookie cannot have.
    """

    source = "cookie"

    def __init__(
        self,
        keys: str | Sequence[str],
        *,
        max_age: int = 60,
        name: str = "sqlroute",
        path: str = "/",
        domain: str | None = None,
        secure: bool = False,
        same_site: str = "Lax",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(keys, max_age=max_age, clock=clock)
        if _NAME.fullmatch(name) is None:
            raise ConfigError((f"name: {name!r} is no name of a cookie",))
        if _TEXT.fullmatch(path + (domain or "")) is None:
            raise ConfigError((f"path, domain: {path!r}, {domain!r}; no cookie can have them",))
        if same_site not in _SAME_SITES:
            known = ", ".join(_SAME_SITES)
            raise ConfigError((f"same_site: {same_site!r}; known: {known}",))
        self._prefix = f"{name}="
        attributes = [f"Path={path}"]
        if domain is not None:
            attributes.append(f"Domain={domain}")
        if secure:
            attributes.append("Secure")
        self._attributes = "; ".join([*attributes, "HttpOnly", f"SameSite={same_site}"])

    def read(self, header: str) -> Brought:
        """Return what the ``Cookie`` header of a request has brought."""
        if self._prefix not in header:
            return NOTHING
        if len(header) > LONGEST_HEADER:
            return _refused(f"there are {len(header)} letters of cookies")
        for part in header.split(";"):
            found = part.strip(" \t")
            if found.startswith(self._prefix):
                text = found.removeprefix(self._prefix).strip('"')
                return self.read_text(text) if text else NOTHING
        return NOTHING

    def answer(self, text: str) -> tuple[str, str]:
        """Return the header of a response that makes the client bring back a text.

        Args:
            text: empty to make it forget what it has.
        """
        age = self.max_age if text else 0
        return "Set-Cookie", f"{self._prefix}{text}; Max-Age={age}; {self._attributes}"


class Header(_Signed):
    """A header of requests and responses, for clients that are programs.

    They send what the last response that had one has given them; an empty one means nothing.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        *,
        max_age: int = 60,
        name: str = "Sqlroute-Token",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(keys, max_age=max_age, clock=clock)
        if _NAME.fullmatch(name) is None:
            raise ConfigError((f"name: {name!r} is no name of a header",))
        self.name = name
        self.source = name.lower()

    def read(self, header: str) -> Brought:
        """Return what the header of a request has brought."""
        text = header.strip(" \t")
        return self.read_text(text) if text else NOTHING

    def answer(self, text: str) -> tuple[str, str]:
        """Return the header of a response that makes the client bring back a text."""
        return self.name, text


def _refused(fault: str, *, is_expired: bool = False) -> Brought:
    return Brought(is_strong=True, fault=fault, is_expired=is_expired)
