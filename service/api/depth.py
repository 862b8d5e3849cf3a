"""How deep JSON nests, told without parsing it: parsers have limits of their own, each another one."""

import re

import numpy as np
import numpy.typing as npt

from service.api.held import Sent
from service.errors import NotJson

JSON_DEPTH = 512  # brackets within brackets; no call needs ten
TOO_DEEP = f"the body is nested too deeply: at most {JSON_DEPTH} levels are read"
SHORT = 1 << 12  # bytes that are looked through sooner bracket by bracket than all together
PIECE = 1 << 20  # of what is told, looked at together
QUOTE = ord('"')
_QUOTE = re.compile(b'"')  # searches bytes and views alike
REST = bytes(set(range(256)) - set(b'[]{}"'))  # what tells nothing
OPENS = np.zeros(256, np.int8)  # by how much each byte goes deeper
OPENS[list(b"[{")], OPENS[list(b"]}")] = 1, -1


def check_depth(body: Sent) -> None:
    """Refuse JSON that is nested beyond the limit, wherever types would let it stand.

    Raises:
        NotJson: it is.
    """
    if len(body) <= JSON_DEPTH or brackets(body) + brackets(body, b"{") <= JSON_DEPTH:
        return
    if _QUOTE.search(body) is None:
        _check_plain(np.frombuffer(body, np.uint8))
        return
    told = bytes(body).replace(rb"\\", b"").replace(rb"\"", b"").translate(None, REST)
    found, depth, quoted = np.frombuffer(told, np.uint8), np.int32(0), np.False_
    for begin in range(0, len(found), PIECE):
        piece = found[begin : begin + PIECE]
        outside = ~(np.logical_xor.accumulate(piece == QUOTE) ^ quoted)
        depths = depth + np.cumsum(OPENS[piece] * outside, dtype=np.int32)
        if depths.max() > JSON_DEPTH:
            raise NotJson(TOO_DEEP)
        depth, quoted = depths[-1], ~outside[-1]


def _check_plain(found: npt.NDArray[np.uint8]) -> None:
    """The same where there are no strings, and the interpreter is left to others while it is told."""
    depth = np.int32(0)
    for begin in range(0, len(found), PIECE):
        steps = OPENS[found[begin : begin + PIECE]]
        depths = depth + np.cumsum(steps[steps != 0], dtype=np.int32)
        if len(depths):
            if depths.max() > JSON_DEPTH:
                raise NotJson(TOO_DEEP)
            depth = depths[-1]


def brackets(text: Sent, one: bytes = b"[") -> int:
    """How many brackets of a kind there are; of nothing else, `bytes.count` would hold the interpreter for long."""
    if len(text) <= SHORT:
        return bytes(text).count(one)
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord(one)))
