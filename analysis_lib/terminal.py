"""What the command line shows and how it ends: names come from anybody, signals from outside."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def terminated() -> Iterator[None]:
    """Within this context SIGTERM is raised, so that kernels and files are put away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Printable:
    """The output, where names may come from anybody, on a terminal that may not know every letter.

    What would steer the terminal, and what it cannot show, is written out.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(_shown(text, self._stream)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _shown(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return _printable(text).encode(encoding, "backslashreplace").decode(encoding)


def tell(text: str) -> None:
    print(_shown(text, sys.stderr), file=sys.stderr)


def _printable(text: str) -> str:
    """Names in a store may come from anybody: what would steer the terminal is written out."""
    control = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(control, lambda found: f"\\u{ord(found[0]):04x}", text)
