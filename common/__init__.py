"""What every train script shares: the machine (runtime), checkpoints (checkpoint) and the run folder (runlog).

Imported first it makes a process fit for any console: a character that standard output cannot spell is escaped, a
stream that was closed leads nowhere, and a Ctrl-C while imports take their seconds is one line.
"""

import os
import signal
import sys


def open_streams() -> None:
    """Descriptors 0 to 2 are never those of our files: what prints to a stream that was closed would write into them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if getattr(sys.stdout, "errors", "") in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def quiet_interrupt(number: int, frame) -> None:
    """What SIGINT does in a script of this repository outside of its command: some imports would swallow an exception.
    """
    os.write(2, b"stopped\n")
    os._exit(130)


open_streams()
# Where a rank or torchrun dies, torch's C++ would print pages of stack frames around the one line that says so.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
_script = getattr(sys.modules.get("__main__"), "__file__", None) or ""
_is_ours = os.path.dirname(os.path.abspath(_script)) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, quiet_interrupt)
