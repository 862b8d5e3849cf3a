"""Authentication by API key. Calls of administration need an admin key; some paths need none."""

import hashlib
import hmac
from collections.abc import Mapping

from service.errors import AdminDisabled, ApiKeyMissing, ApiKeyUnknown, NotAdmin
from service.settings import Settings

OPEN = frozenset(
    {"/livez", "/readyz", "/metrics", "/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
)
OPEN_PREFIXES = ("/static-offline-docs/", "/console/")
ADMIN_PREFIXES = ("/v2/repository/",)
ADMIN_BY_METHOD = {"PUT": ("/v1/calibration/temperature",)}  # path prefixes: every path below them is guarded
RawHeaders = Mapping[bytes, bytes]


class ApiKeys:
    """The keys of the settings, stored as hashes."""

    def __init__(self, settings: Settings) -> None:
        self._api, self._admin = _hashes(settings.api_keys), _hashes(settings.admin_keys)

    def needed_for(self, method: str, path: str) -> bool:
        """Return whether a call needs a key."""
        if is_admin(method, path):
            return True
        return bool(self._api) and not (path in OPEN or path.startswith(OPEN_PREFIXES) or method == "OPTIONS")

    def check(self, method: str, path: str, headers: RawHeaders) -> None:
        """Accept or reject a call.

        Raises:
            ApiKeyMissing: the request has no key.
            ApiKeyUnknown: the key is not configured.
            NotAdmin: an admin call with a key that is not an admin key.
            AdminDisabled: an admin call, and no admin keys are configured.
        """
        if not self.needed_for(method, path):
            return
        admin = is_admin(method, path)
        if admin and not self._admin:
            raise AdminDisabled("admin calls are disabled: set ENGINE_HEALTH_ADMIN_KEYS and restart")
        key_hash = _key_hash(headers)
        if key_hash is None:
            raise ApiKeyMissing("an API key is required: send Authorization: Bearer KEY, or X-API-Key: KEY")
        if _contains(self._admin, key_hash):
            return
        if not _contains(self._api, key_hash):
            raise ApiKeyUnknown("this API key is not configured")
        if admin:
            raise NotAdmin("this API key is not authorised for admin calls")


def is_admin(method: str, path: str) -> bool:
    """Return whether a call needs an admin key."""
    return path.startswith(ADMIN_PREFIXES) or path.startswith(ADMIN_BY_METHOD.get(method, ()))


def fingerprint(headers: RawHeaders) -> str:
    """Return a short name of the key of a request, from which the key cannot be derived."""
    key_hash = _key_hash(headers)
    return "none" if key_hash is None else f"key {key_hash.hex()[:8]}"


def _key_hash(headers: RawHeaders) -> bytes | None:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    key = (token if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")).strip()
    return hashlib.sha256(key).digest() if key else None


def _hashes(keys: str) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.strip().encode()).digest() for key in keys.split(",") if key.strip())


def _contains(keys: tuple[bytes, ...], key_hash: bytes) -> bool:
    """Compare with every key in constant time, so that the duration reveals nothing."""
    return sum(hmac.compare_digest(key_hash, key) for key in keys) > 0
