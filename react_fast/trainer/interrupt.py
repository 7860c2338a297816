"""Ctrl-C and SIGTERM ask a run to stop where it can go on later; a second Ctrl-C stops it at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While open, the first signal only sets `requested`; the trainer looks at it between steps.

    Args:
        notice: called with one line when the first signal comes.

    Outside the main thread, where Python allows no handlers, signals keep their usual meaning.
    """

    def __init__(self, notice: Callable[[str], None] = print) -> None:
        self.requested = False
        self._notice = notice
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._notice("stopping after this step, with a checkpoint; once more stops at once")
