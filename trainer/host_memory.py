"""What becomes of the memory that a step on a CPU gives back."""

import ctypes
import sys

# of malloc.h
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Have this process keep freed memory for its next step.

    Left to itself, the GNU C library gives a step's largest arrays back to the system, which must
    find and zero the same pages again for the next step: some 120,000 of them with 135 million
    weights, a tenth of the step's time. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_TRIM_THRESHOLD, _NEVER)
        set_option(_MMAP_MAX, 0)
