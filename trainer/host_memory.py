"""What becomes of the memory that a step on a CPU gives back."""

import ctypes
import sys

# mallopt's numbers for them, of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_MOST = 32 * 2**20  # bytes; what the library allows


def keep_freed_memory() -> None:
    """Have this process keep freed memory for its next step, arrays above 32 MiB apart.

    Left to itself, the GNU C library gives most of what a step used back to the system, which must
    find and zero pages for the next step again: 120,000 of them with 135 million weights, nearly a
    tenth of the step's time; this leaves a third of them. Larger arrays still go back: kept, they
    would leave holes that only their like could fill. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _MOST)
        set_option(_TRIM_THRESHOLD, _NEVER)
