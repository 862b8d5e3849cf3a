"""Calls of a running service that outlive its restarts: a call is repeated, the same bytes, until it is answered.

Every call here may be repeated without harm: a flight or an end that is known already changes nothing. Knows HTTP and
the clock, no engines.
"""

import http.client
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from service.errors import ServiceError

LATER = (408, 429, 502, 503, 504)  # answers that say: not now
CALL_SECONDS = 30.0  # for one try
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between two tries, doubled each time
MOST_ANSWER = 64 * 2**20  # bytes
PRINTED = re.compile("[!-~]*")  # what a request line can hold
SHOWN = 300  # characters of what a service says
KEY_HINT = {401: "; --key KEY shows one", 403: "; --key KEY shows another one"}


class CallFailed(ServiceError):
    """A service that refuses a call, or did not answer for as long as was agreed; one line says which."""


class Answered(NamedTuple):
    """Status and JSON of an answer: 200, or 409 with what contradicts what."""

    status: int
    body: Any


class Client:
    """One connection, opened again when it breaks.

    Args:
        url: of the service.
        key: shown with every call, if not empty.
        patience: seconds without an answer after which a call fails.
        wait: sleeps, and shows meanwhile what is shown.
        trouble: told once in each outage why a call is repeated, and None when it was answered.

    Raises:
        CallFailed: an address or a key that no call can have.
    """

    def __init__(
        self,
        url: str,
        key: str,
        patience: float,
        wait: Callable[[float], None] = time.sleep,
        trouble: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self.url, self._at = url, parse_url(url)
        if not (key.isascii() and (key.isprintable() or not key)):
            raise CallFailed("--key: a key is printable ASCII")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._patience, self._wait, self._trouble = patience, wait, trouble
        self._connection: http.client.HTTPConnection | None = None
        self.repeated = 0

    def call(self, method: str, path: str, body: bytes | None = None) -> Answered:
        """The answer to a call, repeated until there is one.

        Raises:
            CallFailed: refused, or no answer for too long.
        """
        until, pause, told = time.monotonic() + self._patience, FIRST_WAIT, False
        while True:
            reason, asked = self._try(method, path, body)
            if isinstance(reason, Answered):
                if told:
                    self._trouble(None)
                return reason
            pause = max(pause, asked)
            if time.monotonic() + pause > until:
                raise CallFailed(f"{self.url}: no answer for {self._patience:g} s: {reason}")
            if not told:
                self._trouble(reason)
            told, self.repeated = True, self.repeated + 1
            self._wait(pause)
            pause = min(2 * pause, LONGEST_WAIT)

    def _try(self, method: str, path: str, body: bytes | None) -> tuple[Answered | str, float]:
        """One try: an answer, or why there is none yet and in how many seconds to come back."""
        try:
            self._connection = self._connection or self._connect()
            self._connection.request(method, self._at.path.rstrip("/") + path, body, self._headers)
            answer = self._connection.getresponse()
            text = answer.read(MOST_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return _said(error), 0.0
        if answer.will_close:
            self.close()
        if answer.status in LATER:
            return f"{answer.status} {_detail(text)}", _seconds(answer.getheader("Retry-After"))
        return self._understood(answer.status, path, text), 0.0

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._at.scheme == "https" else http.client.HTTPConnection
        return kind(self._at.hostname or "", self._at.port, timeout=CALL_SECONDS)

    def _understood(self, status: int, path: str, text: bytes) -> Answered:
        if status not in (200, 409):
            detail = _detail(text) + KEY_HINT.get(status, "")
            raise CallFailed(f"{self.url}{path} answered {status}: {detail}")
        try:
            return Answered(status, json.loads(text))
        except ValueError:
            raise CallFailed(f"{self.url}{path}: what answers there is no engine-health") from None

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def parse_url(url: str) -> SplitResult:
    """Where a service is.

    Raises:
        CallFailed: no http or https address.
    """
    try:
        at = urlsplit(url)
        (at.hostname or "").encode("idna")
        if not PRINTED.fullmatch(at.path):
            raise ValueError
        if at.scheme not in ("http", "https") or not at.hostname or at.port == 0 or at.query or at.fragment:
            raise ValueError
    except ValueError:
        raise CallFailed(f"{url!r} is no address of a service, as http://127.0.0.1:8000 is") from None
    return at


def _said(error: Exception) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, TimeoutError):
        return "it takes too long"
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(words)[:SHOWN]


def _detail(text: bytes) -> str:
    """What a problem document says, or the beginning of whatever came instead."""
    try:
        return str(json.loads(text)["detail"])[:SHOWN]
    except (ValueError, KeyError, TypeError):
        return " ".join(text[:SHOWN].decode(errors="replace").split())


def _seconds(retry_after: str | None) -> float:
    """`Retry-After` in seconds; a date, which hardly anybody sends, is left to our own pauses."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
