"""Ctrl-C: the first one ends the run in order, a second one leaves at once.

The first is a KeyboardInterrupt in the main thread, as ever. Where an event loop runs it comes from the loop,
between two callbacks: raised inside one, it could make the loop wait for ever for a task it lost.

The second is seen by a thread that does nothing else, so that nothing keeps it out: no slow fsync, no thread
that still generates, no library that computes for minutes without a look at Python. (On Windows, where
asyncio needs the only wake-up for itself, it waits until the main thread comes back to Python.)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130
SAME_PRESS_S = 0.2
"""`timeout` and some launchers send the signal twice: what comes so soon after is the same Ctrl-C."""
PATIENCE_S = 1.0


def watch(say: Callable[[], None], leave: Callable[[], None]) -> None:
    """Take over Ctrl-C, unless the process was started to ignore it. Call it in the main thread.

    `say` is called where the first one has not ended the process within a second; `leave` is the last that
    is done after the second one, and must wait for nothing.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reading, writing = os.pipe()
    threading.Thread(target=_watch, args=(reading, say, leave), name="Ctrl-C", daemon=True).start()
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if sys.platform == "win32":
            os.write(writing, bytes([number]))
        if not pressed:
            pressed = True
            _stop()

    signal.signal(signal.SIGINT, interrupt)
    if sys.platform != "win32":
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # The same Ctrl-C reaches a forked child too: it must not count as another one here.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _watch(reading: int, say: Callable[[], None], leave: Callable[[], None]) -> None:
    _wait(reading)
    pressed = time.monotonic()
    hint = threading.Timer(PATIENCE_S, say)
    hint.daemon = True
    hint.start()
    while time.monotonic() - pressed < SAME_PRESS_S:
        _wait(reading)
    leave()
    os._exit(EXIT_CODE)


def _wait(reading: int) -> None:
    while os.read(reading, 1)[0] != signal.SIGINT:
        pass


def _stop() -> None:
    asyncio = sys.modules.get("asyncio")
    try:
        loop = asyncio.get_running_loop() if asyncio else None
    except (RuntimeError, AttributeError):  # none runs, or asyncio itself is being imported
        loop = None
    if loop is None:
        raise KeyboardInterrupt
    loop.call_soon_threadsafe(_raise)


def _raise() -> NoReturn:
    raise KeyboardInterrupt
