"""Threads, processes and signals: what runs beside a call, or interrupts it, changes no value and hangs nothing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pycse import alignment, fused_distill, fused_distillcse, fused_focal_infonce, fused_infonce, uniformity
from pycse.sparse import SparseLinear, masked_linear

LINUX = sys.platform == "linux"
LONG = 300  # seconds until something hangs, on a machine that is busy
FORK = pytest.mark.skipif(not LINUX, reason="fork and GNU's OpenMP runtime are Linux's")


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


# Small batches in one native call, and batches by panels; inputs are shared by all threads.
Z1, Z2, SHORT1, SHORT2, E = rows(520, 96), rows(700, 96, 1), rows(33, 40), rows(50, 40, 2), rows(520, 24, 3)
WEIGHT, BIAS, MASK = rows(64, 96, 4), rows(1, 64, 5)[0], rows(64, 96, 6) > 0.8
for t in (Z1, Z2, SHORT1, SHORT2, WEIGHT, BIAS):
    t.requires_grad_()
LAYER = SparseLinear(96, 64, mask=MASK, pattern="unstructured")
PACKED = SparseLinear(96, 64, mask=MASK, pattern="unstructured").eval()
CALLS = {
    "small": lambda: gradients(fused_focal_infonce(SHORT1, SHORT2), SHORT1, SHORT2),
    "small, symmetric": lambda: gradients(fused_infonce(SHORT1, SHORT2[:33], symmetric=True), SHORT1, SHORT2),
    "panels": lambda: gradients(fused_infonce(Z1, Z2), Z1, Z2),
    "rows": lambda: gradients(fused_focal_infonce(Z1, Z2, reduction="none").square().sum(), Z1, Z2),
    "torch": lambda: gradients(fused_infonce(Z1, Z2, backend="torch"), Z1, Z2),
    "distill": lambda: gradients(fused_distill(Z1, [E], seed=1), Z1),
    "small distill": lambda: gradients(fused_distill(SHORT1, [E[:33]], seed=1), SHORT1),
    "distillcse": lambda: gradients(fused_distillcse(SHORT1, SHORT2, [E[:33]], seed=2).loss, SHORT1, SHORT2),
    "uniformity": lambda: gradients(uniformity(Z1), Z1),
    "alignment": lambda: gradients(alignment(Z1, Z2[:520]), Z1, Z2),
    "masked_linear": lambda: gradients(masked_linear(Z1, WEIGHT, MASK, BIAS).square().sum(), Z1, WEIGHT, BIAS),
    "SparseLinear": lambda: gradients(LAYER(Z1).square().sum(), Z1, LAYER.weight),
    "SparseLinear, packed": lambda: (PACKED(Z1.detach()).detach(),),
}


def test_calls_from_eight_threads_give_the_serial_bits():
    serial = {name: call() for name, call in CALLS.items()}
    names = [name for name in CALLS for _ in range(8)]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    start = threading.Barrier(8)

    def work(k):
        start.wait()
        return [(names[i], CALLS[names[i]]()) for i in order[k::8]]

    with ThreadPoolExecutor(8) as pool:
        results = [pair for done in pool.map(work, range(8)) for pair in done]
    assert len(results) == len(names)
    for name, result in results:
        for got, expected in zip(result, serial[name]):
            assert torch.equal(got, expected), name


def test_the_number_of_threads_may_change_in_the_middle():
    expected = {name: call() for name, call in CALLS.items()}
    before = torch.get_num_threads()
    try:
        for count in (1, 4, 2, 3):
            loss = fused_focal_infonce(Z1, Z2, reduction="none")
            torch.set_num_threads(count)  # between forward and the gradients, which are computed in backward
            close((loss.detach(), *torch.autograd.grad(loss, (Z1, Z2), torch.ones(520))), rows_of_ones())
            for name, call in CALLS.items():
                close(call(), expected[name], name)
    finally:
        torch.set_num_threads(before)


def rows_of_ones():
    loss = fused_focal_infonce(Z1, Z2, reduction="none", backend="torch")
    return loss.detach(), *torch.autograd.grad(loss, (Z1, Z2), torch.ones(520))


def close(got, expected, name=""):
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    code = PRELUDE + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=LONG,
    )  # fmt: skip


PRELUDE = """
import os, signal, sys, threading, time
import torch
from pycse import fused_focal_infonce, fused_infonce, uniformity, fused_distill
from pycse.sparse import SparseLinear

def points(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

def use(n=300, d=64, backend="cpu"):
    z1, z2 = points(n, d).requires_grad_(), points(n + 20, d, 1)
    loss = fused_infonce(z1, z2, backend=backend)
    loss.backward()
    return loss.item() + z1.grad.double().norm().item()

def right(value):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    z1, z2 = points(300, 64).double().requires_grad_(), points(320, 64, 1).double()
    loss = fused_infonce(z1, z2, backend="reference")
    loss.backward()
    torch.set_num_threads(before)
    return abs(value - loss.item() - z1.grad.norm().item()) < 1e-4 * abs(value)

def in_child(work, seconds=60):
    '''What the forked child says of itself; "hangs" where it says nothing.'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(work())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return os.read(read, 10000).decode()
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"
"""


# Kernels may get fewer threads than they ask for.
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_THREAD_LIMIT": "2"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_NESTED": "true", "OMP_MAX_ACTIVE_LEVELS": "3"},
    ],
    ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()),
)
def test_fewer_threads_than_asked_for(environment):
    result = python(
        """
        torch.set_num_threads(4)
        from torch import tensor
        z = points(520, 96).requires_grad_()
        layer = SparseLinear(96, 64, mask=points(64, 96, 6) > 0.8, pattern="unstructured", backend="cpu")
        kept = (points(2, 3, 6) > 0).repeat_interleave(32, 0).repeat_interleave(32, 1)
        blocks = SparseLinear(96, 64, mask=kept, pattern="block32", backend="cpu")
        assert right(use()), use()
        for call in (
            lambda b: fused_focal_infonce(z, points(700, 96, 1), exclude_above=0.1, backend=b),
            lambda b: fused_infonce(z, points(520, 96, 1), symmetric=True, backend=b),
            lambda b: fused_infonce(z[:20], points(30, 96, 1), backend=b),
            lambda b: fused_infonce(z[:20], points(20, 96, 1), symmetric=True, backend=b),
            lambda b: fused_distill(z, [points(520, 24, 3)], shuffle="none", backend=b),
            lambda b: fused_distill(z[:20], [points(20, 24, 3)], shuffle="none", backend=b),
            lambda b: uniformity(z, backend=b),
        ):
            (a, da), (e, de) = ((l.detach(), torch.autograd.grad(l, z)[0]) for l in (call("cpu"), call("torch")))
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(da, de, rtol=1e-3, atol=1e-5)
        for made in (layer, blocks):
            y = made(z)
            dense = torch.nn.functional.linear(z, made.weight * made.mask, made.bias)
            torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-5)
            for got, expected in zip(
                torch.autograd.grad(y.square().sum(), (z, made.weight)),
                torch.autograd.grad(dense.square().sum(), (z, made.weight)),
            ):
                expected = expected * made.mask if got.shape == made.mask.shape else expected
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        print("right")
        """,
        **environment,
    )
    assert result.stdout == "right\n", result.stdout + result.stderr


def test_inside_another_parallel_region():
    """The autograd engine and torch.jit.fork run calls beside each other, each of which asks for threads."""
    serial = CALLS["panels"]()
    done = [torch.jit.fork(CALLS["panels"]) for _ in range(6)]
    for future in done:
        for got, expected in zip(torch.jit.wait(future), serial):
            assert torch.equal(got, expected)


NAMED = "RuntimeError: pycse was used before this process was forked, and OpenMP's threads stayed behind in the parent"
FORKS = {  # what is done, then what the child of a fork says
    "before the first call": ("torch.set_num_threads(2)", "right(use())", "True"),
    "after use on one thread": (
        "torch.set_num_threads(1); use()",
        "(torch.set_num_threads(2), right(use()))[1]",
        "True",
    ),
    "after use": ("torch.set_num_threads(2); use()", "use()", NAMED),
    "a small call": ("", "use(4, 3)", NAMED),
    "another backend": ("", "use(backend='torch')", NAMED),
    "a layer": ("", "SparseLinear(8, 8, mask=points(8, 8) > 0, pattern='unstructured')(points(2, 8))", NAMED),
    "on one thread": ("", "(torch.set_num_threads(1), right(use()))[1]", "True"),
    "no longer on one thread": ("", "(torch.set_num_threads(1), use(), torch.set_num_threads(2), use())", NAMED),
    "a child of the child": ("", "in_child(lambda: use())", NAMED),
}


@FORK
def test_fork_after_use_is_told_from_a_hang():
    """A thread that did not call has no threads to lose, so its child works; and the parent goes on after any fork."""
    script = "".join(
        f"{before}\nprint({name!r}, in_child(lambda: {work}), sep=': ')\n" for name, (before, work, _) in FORKS.items()
    )
    result = python(
        script
        + "thread = threading.Thread(target=lambda: print('thread:', in_child(lambda: right(use()))))\n"
        + "thread.start(); thread.join(); print('parent:', right(use()))"
    )
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    for name, (_, _, expected) in FORKS.items():
        assert said.get(name, result.stderr).startswith(expected), name
    assert said["thread"] == said["parent"] == "True"


@FORK
def test_workers_of_a_data_loader_call_after_a_fork():
    """They run on one thread. Losses made there, and what a training loop does beside them."""
    result = python(
        """
        from torch.utils.data import DataLoader, Dataset

        class Losses(Dataset):
            def __len__(self):
                return 6
            def __getitem__(self, k):
                return torch.tensor([use(), torch.get_num_threads()], dtype=torch.float64)

        torch.set_num_threads(2)
        own = use()
        for _ in range(2):
            for batch in DataLoader(Losses(), batch_size=2, num_workers=2, multiprocessing_context="fork"):
                assert all(right(value) and threads == 1 for value, threads in batch.tolist()), batch
                assert abs(use() - own) < 1e-6
        print("right")
        """
    )
    assert result.stdout == "right\n", result.stdout + result.stderr


def remote(n: int) -> float:
    z = rows(n, 16).requires_grad_()
    loss = fused_infonce(z, rows(n, 16, 1))
    loss.backward()
    return loss.item() + z.grad.norm().item()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_start_afresh(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} is not available on {sys.platform}")
    here = remote(300)
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.map_async(remote, [300, 300]).get(LONG)
    assert all(abs(value - here) < 1e-5 * abs(here) for value in there)


# SIGINT arrives while a call of 40 panels is at work. How long a panel takes is measured in the same process, so a
# machine that is busy is slow in both.
INTERRUPTED = """
panel, N = 1024, 3072
z1, z2, positives = points(40 * panel, 64), points(N, 64, 1), torch.arange(40 * panel) % N
z1.requires_grad_()
before = z1.detach().clone(), z2.clone()

def forward(n):
    return fused_focal_infonce(z1[:n], z2, positives=positives[:n], backend={backend!r}, reduction={reduction!r})

def timed(work):
    began = time.monotonic()
    work()
    return time.monotonic() - began

forward(panel).sum().backward()
took = max(timed(lambda: forward(panel).sum().backward()) for _ in range(3))
loss = forward(40 * panel) if {backward} else None
sent = []

def interrupt():
    time.sleep(4 * took)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    loss.sum().backward() if {backward} else forward(40 * panel)
    print("never interrupted")
except KeyboardInterrupt:
    waited = time.monotonic() - sent[0]
    print("interrupted" if waited < 0.2 + 10 * took else f"interrupted after {{waited}} s, a panel takes {{took}} s")
thread.join()
assert torch.equal(z1.detach(), before[0]) and torch.equal(z2, before[1])
assert right(use(backend={backend!r}))
"""


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupt_is_taken_between_panels(where, backend):
    result = python(
        INTERRUPTED.format(
            backend=backend, backward=where == "backward", reduction="none" if where == "backward" else "mean"
        )
    )
    assert result.stdout == "interrupted\n" and result.returncode == 0, result.stdout + result.stderr


def test_exit_during_a_call_ends_as_it_does_for_pytorch():
    """A daemon thread that comes back from C++ while the interpreter ends aborts the process from PyTorch's bindings,
    whatever the call was (CPython before 3.14 unwinds such a thread through them). It must not end any other way."""
    code = """
        a = points(1500, 1500)
        def work():
            while True:
                {call}
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep({seconds})
        print("exit", flush=True)
        """
    ends = {python(code.format(call="torch.mm(a, a)", seconds=0.3)).returncode, 0}
    for call, seconds in (("use(3000, 128)", 0.3), ("use(20, 16)", 0.3), ("use(3000, 128)", 0.0)):
        result = python(code.format(call=call, seconds=seconds))
        assert result.stdout == "exit\n" and result.returncode in ends, (result.returncode, result.stderr[-2000:])


@FORK
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_fork_after_small_calls_of_pytorchs_operators_is_no_error(backend):
    done = python(f"""
torch.set_num_threads(2)
z = points(4, 8)
expected = fused_infonce(z, z, backend={backend!r})
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fused_infonce(z, z, backend={backend!r}), expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")
    assert done.returncode == 0, done.stderr
