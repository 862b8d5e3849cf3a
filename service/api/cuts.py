"""Long lists of numbers cut out of a JSON body before it is parsed, so that no parser holds the interpreter for long.

What is left is parsed at once, and is short; the lists are read afterwards, a piece at a time. Nothing goes unread:
what was cut out stands in its list to the last character, and is refused there if it is no list. A list that nobody
asks for, of a name told twice say, is looked at in the end.
"""

import re
import secrets
from collections.abc import Collection

import msgspec
from msgspec import Raw

from service.api.held import Sent
from service.errors import NotJson

LONG = 4096  # bytes; a shorter list stays where it is
TAIL = 256  # bytes behind a list in which its end is looked for
_MARK = secrets.token_hex(16).encode()  # nobody can send what stands for a list
_BETWEEN = b" \t\r\n,{}"
_BEGIN = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*\[")


class Cuts(dict[bytes, memoryview]):
    """Lists of a body by the marks that stand for them; `read` are the marks of those that somebody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[bytes] = set()


def cut(sent: Sent, names: Collection[bytes]) -> tuple[Sent, Cuts]:
    """A body whose long lists of numbers under some names are short marks, and the lists by their marks."""
    cuts, body = Cuts(), bytes(sent)  # a view has no `find`
    kept, done, begin = [], 0, body.find(b'"')
    while begin >= 0:
        end = body.find(b'"', begin + 1)
        following = body.find(b'"', end + 1) if end >= 0 else -1
        until = len(body) if following < 0 else following
        if until - end > LONG and body[begin + 1 : end] in names and (found := _list(body, end + 1, until)):
            mark = b'"%s-%d"' % (_MARK, len(cuts))
            cuts[mark] = memoryview(body)[found[0] : found[1]]
            kept += [body[done : found[0]], mark]
            done = found[1]
        begin = following
    if not cuts:
        return body, cuts
    short = b"".join((*kept, body[done:]))
    return (short, cuts) if b"\\" not in short else (body, Cuts())  # a quote might be part of a text


def uncut(raw: Raw, cuts: Cuts) -> bytes | memoryview:
    """What stood there before anything was cut out, not copied if it was."""
    text = bytes(raw)
    if text not in cuts:
        return text
    cuts.read.add(text)
    return cuts[text]


def whole(raw: Raw, cuts: Cuts) -> bytes:
    """The same as bytes of its own."""
    return bytes(uncut(raw, cuts))


def check_unread(cuts: Cuts) -> None:
    """Refuse what was cut out of a body, read by nobody, and is no JSON.

    Raises:
        NotJson: there is such a thing.
    """
    for mark in cuts.keys() - cuts.read:
        try:
            msgspec.json.decode(cuts[mark], type=Raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NotJson(f"the body is not JSON: {error}") from None


def _list(body: bytes, begin: int, end: int) -> tuple[int, int] | None:
    """Where the list between two texts begins and ends; None if it is none that could be cut out."""
    colon = _BEGIN.match(body, begin, end)
    if colon is None:
        return None
    tail = body[max(colon.end(), end - TAIL) : end].rstrip(_BETWEEN)
    while (before := tail[:-1].rstrip(_BETWEEN[:4])).endswith(b"}"):  # that bracket closes a list of objects
        tail = before.rstrip(_BETWEEN)
    if not tail.endswith(b"]"):
        return None
    return colon.end() - 1, max(colon.end(), end - TAIL) + len(tail)
