"""Random identifiers of requests and predictions. Standard library only."""

import os

REQUEST_ID_BYTES, _PREDICTION_BYTES = 8, 10


def request_id() -> str:
    """Return 16 random hexadecimal digits."""
    return os.urandom(REQUEST_ID_BYTES).hex()


def prediction_ids(n: int, now: float) -> list[str]:
    """Return `n` unique identifiers that sort by time: 48 bits of milliseconds, then 80 random bits."""
    prefix, digits, width = f"{int(now * 1e3):012x}", os.urandom(_PREDICTION_BYTES * n).hex(), 2 * _PREDICTION_BYTES
    if n == 1:
        return [prefix + digits]
    return [prefix + digits[k : k + width] for k in range(0, width * n, width)]
