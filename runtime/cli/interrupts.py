"""Ctrl-C from the first moment on: `KeyboardInterrupt`, but never inside an import.

An interrupt in the middle of an import reaches the user as the library's own error, or leaves half a library behind.
There the handler asks to be called again soon; everywhere else it raises. This module imports nothing that takes time.
"""

from __future__ import annotations

import _thread
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130
"""The exit code of an interrupted command."""

AGAIN = 0.02
"""Seconds after which an interrupt that was held back is tried again."""

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
_asked = False


def watch() -> None:
    """Handle the interrupts of this process from now on."""
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _unraisable


def stop() -> None:
    """Spare the rest of the process a traceback: after an interrupt another one kills, else it changes nothing."""
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.SIG_DFL if _asked else signal.SIG_IGN)


def forget() -> None:
    """Make Python forget an interrupt that has been handled.

    One that leaves text under `exec` or `eval` (dataclasses and annotations are made so) is noted, and Python would end
    the process by the signal whatever its exit code; the next such text takes the note away.
    """
    eval("None")


def asked() -> bool:
    """Tell whether there was an interrupt, be it held back: whatever error comes after it is not what counts."""
    return _asked


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if _importing(frame):
        _thread.start_new_thread(_again, ())
        return
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _again() -> None:
    time.sleep(AGAIN)
    _thread.interrupt_main()


def _unraisable(report: UnraisableHookArgs) -> Any:
    """Try again where Python drops exceptions: in finalizers and in callbacks from libraries."""
    if issubclass(report.exc_type, KeyboardInterrupt):
        _thread.start_new_thread(_again, ())
    else:
        sys.__unraisablehook__(report)
