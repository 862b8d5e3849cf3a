"""Random identifiers of requests and predictions. Standard library only."""

import os

_REQUEST_BYTES, _PREDICTION_BYTES = 8, 10


def request_id() -> str:
    """Return 16 random hexadecimal digits."""
    return os.urandom(_REQUEST_BYTES).hex()


def prediction_ids(n: int, now: float) -> list[str]:
    """Return `n` unique identifiers that sort by time: 48 bits of milliseconds, then 80 random bits."""
    begin, text, width = f"{int(now * 1e3):012x}", os.urandom(_PREDICTION_BYTES * n).hex(), 2 * _PREDICTION_BYTES
    return [begin + text[at : at + width] for at in range(0, width * n, width)]
