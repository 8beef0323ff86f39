"""Lets a process that moves files keep the memory that it frees, for its next buffers."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library reuse large blocks instead of giving each back to the system.

    glibc does the latter with buffers of the size of a part. Each new one then costs a page fault
    for every 4 KiB, which on a virtual machine may take as long as moving the bytes. The process
    keeps as much memory as it needed at most; it should be one that ends after its transfers.

    Returns:
        Whether the C library can do that (glibc: mallopt(3)); without, nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena: what one thread has freed is there for the next one.
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) for name, value in wanted)
