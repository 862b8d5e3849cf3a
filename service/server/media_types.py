"""Media types of request bodies."""

from starlette.requests import Request

from service.errors import UnsupportedMediaType
from service.server.scope import context_of

JSON = "application/json"
JSON_HEADER = JSON.encode()  # the usual form of the header


def media_type(request: Request, accepted: tuple[str, ...]) -> str:
    """Return the media type of a body, which is one of those accepted; without a header, the first of them.

    Raises:
        UnsupportedMediaType: another one.
    """
    header = context_of(request.scope).headers.get(b"content-type")
    if header is None or header == JSON_HEADER:
        kind = JSON if header else accepted[0]
    else:
        kind = header.decode("latin-1").partition(";")[0].strip().lower()
    if kind.endswith("+json"):
        kind = JSON
    if kind not in accepted:
        raise UnsupportedMediaType(f"content type {kind[:80]!r}: expected {' or '.join(accepted)}")
    return kind
