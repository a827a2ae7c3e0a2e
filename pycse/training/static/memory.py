"""Memory that a step frees and the next one takes again."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 2**30, TOP_PAD: 2**28}


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the whole process; False where the allocator is another one.

    As it comes it gives large tensors back to the system at once, and a step's gradient alone (30,522 x 1024 numbers,
    125 MB) takes its 30,000 pages anew each time: 60 to 130 ms on a virtual machine, twice what AdamW takes for all of
    its work.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (whether it is there)
        return {libc.mallopt(option, value) for option, value in KEPT.items()} == {1}
    except (AttributeError, OSError, TypeError):  # no glibc; Windows wants a name
        return False
