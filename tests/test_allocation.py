"""What the C library says of its heap, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, threading
from ktmerge.allocation import share_one_heap

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped bytes_mapped a b c d e".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
if sys.argv[1] == "shared":
    share_one_heap()
bytearray(20 << 20)  # from then on glibc takes less than that from the heap, if it is left alone
before = libc.mallinfo2().mapped
held = bytearray(2 << 20)
print(libc.mallinfo2().mapped - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not a recent glibc")
@pytest.mark.parametrize(("way", "mapped"), [("shared", "1"), ("alone", "0")])
def test_large_arrays_lie_outside_the_heap(way: str, mapped: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mapped
