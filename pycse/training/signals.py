"""SIGINT, SIGTERM and SIGHUP: between two steps the training saves and stops; elsewhere it ends at once.

The first signal is noted while a training is under way, and acted upon after the step. A second one ends the process as
the system does it. The exit code is 128 + the signal's number, as a shell has it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from pycse.training import ranks

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

_noting = False
_noted: int | None = None


class Interrupted(BaseException):
    """A signal has ended the run.

    Fields:
        number: of the signal.
        words: what was saved, and how to go on.
    """

    def __init__(self, number: int, words: str = ""):
        super().__init__(words)
        self.number, self.words = number, words


def name(number: int) -> str:
    return signal.Signals(number).name


def receive(number: int, frame: FrameType | None) -> None:
    global _noted
    if not _noting:
        raise Interrupted(number)
    # A launcher sends SIGTERM to ranks that a terminal's SIGINT has reached already: that is no second wish.
    others = [] if ranks.size() == 1 else [known for known in NUMBERS if known != number]
    if _noted is None:
        _noted = number
        if ranks.first():
            with suppress(OSError, ValueError):  # the terminal may be what has gone
                print(
                    f"{name(number)}: stopping when this step is saved; once more ends at once",
                    file=sys.stderr,
                    flush=True,
                )
    for known in NUMBERS:
        if known not in others and signal.getsignal(known) is receive:  # nohup's SIGHUP stays ignored
            signal.signal(known, signal.SIG_DFL)


@contextmanager
def received() -> Iterator[None]:
    """Within the block, signals are Interrupted, or noted within :func:`noted`."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, receive)
    try:
        yield
    finally:
        _noted = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noted() -> Iterator[None]:
    """Within the block, a signal waits for :func:`caught`."""
    global _noting
    _noting = True
    try:
        yield
    finally:
        _noting = False


def caught() -> int:
    """The number of the signal that was noted, or 0."""
    return _noted or 0
