"""Peak memory of a call beyond what it leaves behind, measured in two ways.

`peak_allocated` adds up what goes through torch's own allocator (by the profiler's memory events).
That is exact and free of noise; it does not see what compiled kernels take from malloc or from
their stacks.

`peak_resident` sees all memory, by the kernel's high-water mark of this process, which Linux resets
through /proc/self/clear_refs. It is good to about a MiB. A call that finds the pages it needs
already resident would hide them, so free pages are handed back to the system first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_allocated", "peak_on_gpu", "peak_resident"]

MIB = 2**20


def peak_allocated(run: Callable[[], object]) -> float:
    """MiB that tensors took at the peak of `run()`, less those that are left at its end."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del kept
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return max(0, peak - max(0, held)) / MIB


def peak_on_gpu(run: Callable[[], object]) -> float:
    """MiB that tensors took on the GPU at the peak of `run()`, less those left at its end."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    left = torch.cuda.memory_allocated()
    del kept
    return (torch.cuda.max_memory_allocated() - max(before, left)) / MIB


def peak_resident(run: Callable[[], object]) -> float | None:
    """MiB of resident memory at the peak of `run()`, less those at its end; None off Linux."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        gc.collect()
        libc.malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        kept = run()
        peak = _status("VmHWM")
        gc.collect()
        libc.malloc_trim(0)
        left = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    del kept
    return max(0.0, peak - max(before, left))


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on the file of stderr, where the profiler's library says when it starts and stops."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024


if __name__ == "__main__":  # what both say of a call that is known: 32 MiB on the way, 8 MiB kept
    values = torch.ones(8 * MIB // 4)

    def known() -> torch.Tensor:
        doubled = [values * 2 for _ in range(4)]
        return doubled[0] + doubled[-1]

    print(f"allocated {peak_allocated(known):.1f} MiB, resident {peak_resident(known):.1f} MiB")
