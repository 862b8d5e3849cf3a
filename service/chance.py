"""Names that nobody guesses, of bytes that the system is asked for many at a time: a question takes it two µs."""

import os
from collections import deque

MANY = 256


class Names:
    """Random hexadecimal names of one length; in any thread."""

    def __init__(self, size: int) -> None:
        """So many bytes each."""
        self._size = size
        self._left: deque[str] = deque()

    def one(self) -> str:
        """A name that was never given before."""
        while True:
            try:
                return self._left.popleft()
            except IndexError:
                self._left.extend(self.some(MANY))

    def some(self, n: int) -> list[str]:
        """As many at once."""
        text, each = os.urandom(self._size * n).hex(), 2 * self._size
        return [text[begin : begin + each] for begin in range(0, each * n, each)]
