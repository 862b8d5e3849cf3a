"""Output of programs on a terminal."""

import os
import re
from collections.abc import Iterator

COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)(?:;\d+)*m")


def read_terminal(handle: int) -> Iterator[bytes]:
    """Yield what programs write to a terminal, until no process has it open."""
    while True:
        try:
            yield os.read(handle, 4096)
        except OSError:  # Linux reports this when no process has the terminal open
            return
