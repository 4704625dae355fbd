"""Ctrl-C, SIGTERM and SIGUSR1 as a request: the step in progress is finished and saved first."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

from diffalign import world
from diffalign.processes import SIGNALS

_NOTICE = (
    b"\nStopping when the step is done and saved; a round that is being sampled is finished first. "
    b"Ctrl-C again stops at once: files that are finished stay.\n"
)


class Interruption:
    """Within this context the first signal is noted; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}
        self._hosts = world.Hosts()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, on every rank the same.

        It waits for the other ranks, which have to ask as well, and for no device.
        """
        return self._hosts.any(self.requested)

    def __enter__(self) -> Interruption:
        self._hosts.open()
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._hosts.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            os.write(sys.stderr.fileno(), _NOTICE)  # print is not safe in a signal handler
        self.requested = True
