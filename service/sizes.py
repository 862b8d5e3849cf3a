"""How many rows a request of so many bytes will turn out to have, guessed before it is read. Knows no HTTP."""

from collections import defaultdict, deque

RECENT = 8  # requests of about the same length whose rows are remembered


class Sizes:
    """What requests of each length, to a factor of two, had lately.

    The guess is the fewest rows that are likely: a request that is turned away for too many had a cheaper one's room.
    """

    def __init__(self) -> None:
        self._bytes_a_row: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def rows(self, size: int) -> int:
        """The rows of a request of `size` bytes, at least one."""
        seen = self._bytes_a_row.get(size.bit_length())
        return max(1, int(size / max(seen))) if seen else 1

    def saw(self, size: int, rows: int) -> None:
        """A request of `size` bytes had so many rows."""
        self._bytes_a_row[size.bit_length()].append(size / rows)
