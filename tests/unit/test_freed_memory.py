"""What a process pays for buffers that it makes and frees again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from trainyard.freed_memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("impossible")
    raise SystemExit
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    # Parts in transfer at the same time, all touched.
    buffers = [bytearray(16 << 20) for _ in range(4)]
    for buffer in buffers:
        buffer[::4096] = b"x" * 4096
    del buffer, buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> str:
    argv = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_buffers_that_are_made_again_cost_no_page_faults() -> None:
    kept = faults("keep")
    if kept == "impossible":
        pytest.skip("this machine's C library has no mallopt(3)")
    assert int(kept) < int(faults("give back")) / 3
