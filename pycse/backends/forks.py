"""Tells a forked child that OpenMP's threads stayed behind in its parent: it would wait for them forever.

GNU's runtime, which PyTorch brings on Linux, keeps a pool of threads for each thread that ran a parallel region. fork
copies the list of them and not the threads. So the child of a thread that called pycse hangs in its next parallel
region, torch.mm's as well as pycse's, unless it runs on one thread, as the workers of a DataLoader do. Other runtimes
start their threads again.

What cannot be told is a parent that used PyTorch alone: PyTorch keeps no record of its parallel regions.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch as pytorch


class _Thread(threading.local):
    ran = False  # it has a pool: it called pycse with more than one thread
    lost = False  # its pool stayed behind in a parent


_thread = _Thread()


def check(native: bool) -> None:
    """Called before each use of a backend, ``native`` where it will run a parallel region (PyTorch's operators do not
    for small tensors). Raises RuntimeError where the call would wait forever."""
    if not _thread.ran and (native or _thread.lost) and pytorch.get_num_threads() > 1:
        if _thread.lost:
            raise RuntimeError(
                "pycse was used before this process was forked, and OpenMP's threads stayed behind in the parent: with "
                f"torch.get_num_threads() = {pytorch.get_num_threads()} this call would never end. Start processes by "
                "'spawn' or 'forkserver' (torch.multiprocessing.set_start_method), fork before the first call, or call "
                "torch.set_num_threads(1) in the child"
            )
        _thread.ran = native


def _in_child() -> None:
    # In the only thread that lives on, the one that forked.
    if _thread.ran and _gnu():
        _thread.ran, _thread.lost = False, True


def _gnu() -> bool:
    """Whether the OpenMP runtime of this process is GNU's."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
