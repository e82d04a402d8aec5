"""What the C library is told about this process's memory. Linux with glibc alone; elsewhere nothing is done.

May hold nothing of arrays: XLA and numpy ask the C library for theirs.
"""

import ctypes
import os
import sys

TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def on_huge_pages() -> None:
    """Start this process again, its memory on huge pages where the kernel gives them to who asks for them.

    A step's temporaries are taken anew every step, on a CPU: 1.6 GB of them are 400,000 pages of the usual size, and what the
    kernel does for each made a step 8 % longer. glibc can be told only by what a process starts with. A value that is set stays.
    """
    tunables = os.environ.get(TUNABLES, "")
    if sys.platform == "linux" and HUGE not in tunables:
        os.environ[TUNABLES] = f"{tunables}:{HUGE}=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def without_huge_pages() -> dict[str, str]:
    """The environment of this process as it was before `on_huge_pages`, for a process that is not ours."""
    tunables = os.environ.get(TUNABLES, "").split(":")
    return os.environ | {TUNABLES: ":".join(one for one in tunables if one != f"{HUGE}=1")}


def give_back() -> None:
    """Give freed memory back to the system: compiling a step leaves half a gigabyte that nothing asks for again."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
