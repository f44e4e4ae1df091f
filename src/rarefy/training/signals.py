"""Ctrl-C and SIGTERM during training: note them, and let the loop stop where it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; its checkpoint is resumable."""


class Stop:
    """Notes SIGINT and SIGTERM within a `with` block.

    While `gentle` is true a first signal only sets `asked`, and the loop stops after its step; a second one, or any
    while it is false, raises Interrupted at once. Outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.asked = False
        self.gentle = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self.catch()
        return self

    def catch(self) -> None:
        """Install the handlers; again after a library has put its own in their place."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        second = self.asked
        self.asked = True
        if second or not self.gentle:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")
