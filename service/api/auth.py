"""Who may call what: two sets of keys, and the paths that are open to all. Knows headers, no models."""

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
ADMIN = {"PUT": ("/v1/calibration/temperature",)}  # beginnings of paths by method: whatever routes there is guarded
RawHeaders = Mapping[bytes, bytes]


class Keys:
    """The keys of the settings, kept as hashes."""

    def __init__(self, settings: Settings) -> None:
        self._api, self._admin = _hashed(settings.api_keys), _hashed(settings.admin_keys)

    def check(self, method: str, path: str, headers: RawHeaders) -> None:
        """Let a call pass, or not.

        Raises:
            ApiKeyMissing: the request has no key.
            ApiKeyUnknown: the key is not configured.
            NotAdmin: an admin call with a key that is not an admin key.
            AdminDisabled: an admin call, and no admin keys are configured.
        """
        admin = path.startswith(ADMIN_PREFIXES) or path.startswith(ADMIN.get(method, ()))
        if admin and not self._admin:
            raise AdminDisabled("this call is turned off: no ENGINE_HEALTH_ADMIN_KEYS are set")
        if not admin and (not self._api or path in OPEN or path.startswith(OPEN_PREFIXES) or method == "OPTIONS"):
            return
        given = _given(headers)
        if given is None:
            raise ApiKeyMissing("a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        if _among(given, self._admin):
            return
        if not _among(given, self._api):
            raise ApiKeyUnknown("this key is not known")
        if admin:
            raise NotAdmin("this API key is not authorised for admin calls")


def fingerprint(headers: RawHeaders) -> str:
    """Which key was shown, in a word that does not give it away."""
    given = _given(headers)
    return "none" if given is None else f"key {given.hex()[:8]}"


def _given(headers: RawHeaders) -> bytes | None:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    key = (token if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")).strip()
    return hashlib.sha256(key).digest() if key else None


def _hashed(keys: str) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.strip().encode()).digest() for key in keys.split(",") if key.strip())


def _among(given: bytes, keys: tuple[bytes, ...]) -> bool:
    """Compared with every key in constant time, so that how long it took says nothing."""
    return sum(hmac.compare_digest(given, key) for key in keys) > 0
