"""HTTP client that retries a call, with the same bytes, until the service responds.

The service may be restarted meanwhile. Every call of a replay is idempotent: a flight or failure that is stored already
changes nothing.
"""

import http.client
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from service.errors import ServiceError

RETRY_STATUSES = (408, 429, 502, 503, 504)  # statuses of responses after which a call is retried
ATTEMPT_SECONDS = 30.0  # timeout of one attempt
MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.1, 5.0  # pause between two attempts, doubled each time
MAX_RESPONSE_BYTES = 64 * 2**20
PRINTABLE_PATH = re.compile("[!-~]*")  # characters that a request line may have
MAX_DETAIL_CHARACTERS = 300  # maximum length of an error message of the service
KEY_HINT = {401: "; set one with --key KEY", 403: "; set another one with --key KEY"}


class CallFailed(ServiceError):
    """The service rejected a call, or did not respond within the allowed outage. The message is one line."""


class ServiceResponse(NamedTuple):
    """Status (200, or 409 for a conflict) and JSON body of a response."""

    status: int
    body: Any


class RetryingClient:
    """One connection, reopened when it breaks.

    Args:
        url: base URL of the service.
        key: API key sent with every call, if not empty.
        max_outage_seconds: time without a response after which a call fails.
        wait: sleeps for a number of seconds.
        show_outage: receives the reason once per outage, and None when the service responds again.

    Raises:
        CallFailed: the URL or the key is malformed.
    """

    def __init__(
        self,
        url: str,
        key: str,
        max_outage_seconds: float,
        wait: Callable[[float], None] = time.sleep,
        show_outage: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self.url, self._address = url, parse_service_url(url)
        if not (key.isascii() and (key.isprintable() or not key)):
            raise CallFailed("--key: expected printable ASCII characters, got others")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._max_outage_seconds, self._wait, self._show_outage = max_outage_seconds, wait, show_outage
        self._connection: http.client.HTTPConnection | None = None
        self.retries = 0

    def call(self, method: str, path: str, body: bytes | None = None) -> ServiceResponse:
        """Return the response to a call, retried until there is one.

        Raises:
            CallFailed: the service rejected the call, or did not respond within the allowed outage.
        """
        deadline, pause, outage = time.monotonic() + self._max_outage_seconds, MIN_WAIT_SECONDS, False
        while True:
            result, retry_after = self._attempt(method, path, body)
            if isinstance(result, ServiceResponse):
                if outage:
                    self._show_outage(None)
                return result
            pause = max(pause, retry_after)
            if time.monotonic() + pause > deadline:
                raise CallFailed(f"{self.url}: no response for {self._max_outage_seconds:g} s: {result}")
            if not outage:
                self._show_outage(result)
            outage, self.retries = True, self.retries + 1
            self._wait(pause)
            pause = min(2 * pause, MAX_WAIT_SECONDS)

    def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[ServiceResponse | str, float]:
        """Return the response, or the reason for a retry, and the seconds of `Retry-After`."""
        try:
            self._connection = self._connection or self._connect()
            self._connection.request(method, self._address.path.rstrip("/") + path, body, self._headers)
            response = self._connection.getresponse()
            content = response.read(MAX_RESPONSE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return _describe_connection_error(error), 0.0
        if response.will_close:
            self.close()
        if response.status in RETRY_STATUSES:
            return f"{response.status} {_problem_detail(content)}", _retry_after_seconds(
                response.getheader("Retry-After")
            )
        return self._parse_response(response.status, path, content), 0.0

    def _connect(self) -> http.client.HTTPConnection:
        connection_class = (
            http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        )
        return connection_class(self._address.hostname or "", self._address.port, timeout=ATTEMPT_SECONDS)

    def _parse_response(self, status: int, path: str, content: bytes) -> ServiceResponse:
        if status not in (200, 409):
            detail = _problem_detail(content) + KEY_HINT.get(status, "")
            raise CallFailed(f"{self.url}{path} returned {status}: {detail}")
        try:
            return ServiceResponse(status, json.loads(content))
        except ValueError:
            raise CallFailed(f"{self.url}{path}: the server at this URL is not engine-health") from None

    def close(self) -> None:
        """Close the connection. The next call opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def parse_service_url(url: str) -> SplitResult:
    """Parse the base URL of a service.

    Raises:
        CallFailed: it is not an http or https URL.
    """
    try:
        address = urlsplit(url)
        (address.hostname or "").encode("idna")
        if not PRINTABLE_PATH.fullmatch(address.path):
            raise ValueError
        if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
            raise ValueError
        if address.query or address.fragment:
            raise ValueError
    except ValueError:
        raise CallFailed(f"{url!r} is not the URL of a service; expected one like http://127.0.0.1:8000") from None
    return address


def _describe_connection_error(error: Exception) -> str:
    """Return the reason for a failed connection."""
    if isinstance(error, TimeoutError):
        return "timeout"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason)[:MAX_DETAIL_CHARACTERS]


def _problem_detail(content: bytes) -> str:
    """Return the detail of a problem document, or the start of any other body."""
    try:
        return str(json.loads(content)["detail"])[:MAX_DETAIL_CHARACTERS]
    except (ValueError, KeyError, TypeError):
        return " ".join(content[:MAX_DETAIL_CHARACTERS].decode(errors="replace").split())


def _retry_after_seconds(retry_after: str | None) -> float:
    """Return `Retry-After` in seconds. A date is rare and counts as 0."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
