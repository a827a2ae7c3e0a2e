"""One run on several processes: who prints and writes, and how all come to the same end.

A launcher (torchrun, accelerate launch, mpirun) starts the same command several times. The environment of each says
which it is, RANK of WORLD_SIZE and LOCAL_RANK on its machine, and where they meet, MASTER_ADDR and MASTER_PORT. Rank 0
prints and writes; the others do the same work in silence.

They speak through two things:

    the store    keys and values at MASTER_ADDR; knows no devices, and works while others wait in the group
    the group    torch.distributed's collective operations on tensors, gloo on CPUs and nccl on GPUs; the trainer's too

Without a launcher there is one process, rank 0, and nothing here does anything.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pycse.training.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What launchers say: size, rank, rank on this machine. Those of MPI as accelerate reads them.
NAMES = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)
MEETING = timedelta(minutes=5)  # until all have started
WAITING = timedelta(hours=3)  # for a rank that loads a model, or for rank 0, which evaluates

_store: Any = None
_turns = itertools.count()


class Agreed(UserError):
    """A UserError that every rank knows of, so that rank 0 can say it."""


class Elsewhere(Exception):
    """Another rank has failed, and says how."""


def place() -> tuple[int, int, int]:
    """(number of processes, rank, rank on this machine) as the launcher says; (1, 0, 0) without one."""
    for names in NAMES:
        found = [os.environ.get(name, "") for name in names]
        if all(text.isdigit() for text in found) and int(found[0]) > 1:
            return int(found[0]), int(found[1]), int(found[2])
    return 1, 0, 0


def size() -> int:
    return place()[0]


def rank() -> int:
    return place()[1]


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


# ---- the store


def meet() -> Any:
    """The store, connected to at the first call; UserError where the others cannot be met."""
    global _store
    if _store is None:
        from torch.distributed import rendezvous

        for name, value in zip(NAMES[0], place()):  # mpirun has others, which torch does not read
            os.environ[name] = str(value)
        try:
            _store, _, _ = next(rendezvous("env://", timeout=MEETING))
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"rank {rank()} of {size()} cannot meet the others ({str(error).splitlines()[0]}); start all with one "
                f"launcher, as in torchrun --nproc-per-node {size()} -m pycse train"
            ) from error
        _store.set_timeout(WAITING)
    return _store


def exchange(value: Any) -> list[Any]:
    """The value of every rank, which JSON can hold, in their order. All ranks call it, and none goes on before."""
    if size() == 1:
        return [value]
    store, turn = meet(), next(_turns)
    store.set(f"pycse/{turn}/{rank()}", json.dumps(value))
    values = [json.loads(store.get(f"pycse/{turn}/{r}")) for r in range(size())]
    # The store may be in rank 0's process: it stays until all have read.
    if first():
        for r in range(1, size()):
            store.get(f"pycse/{turn}/{r}/read")
    else:
        store.set(f"pycse/{turn}/{rank()}/read", "")
    return values


def of_first(value: Any) -> Any:
    """Rank 0's value, which JSON can hold, on every rank."""
    return exchange(value)[0]


def mean(parts: dict[str, list[float]]) -> dict[str, list[float]]:
    """Means over the ranks of equally long lists of numbers."""
    every = exchange(parts)
    return {name: [sum(values) / len(every) for values in zip(*(one[name] for one in every))] for name in parts}


@contextmanager
def together() -> Iterator[None]:
    """A part of a run that every rank ends, or none: what goes wrong on one rank ends it on all.

    Raises:
        Agreed: a rank raised UserError; with the rank's number unless all found the same.
        Elsewhere: another rank raised something else. What this one raised goes on.
    """
    if size() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    problems = exchange(None if mine is None else {"user": isinstance(mine, UserError), "text": str(mine)})
    found = {r: problem for r, problem in enumerate(problems) if problem is not None}
    if not found:
        return
    if not all(problem["user"] for problem in found.values()):
        if mine is None or isinstance(mine, UserError):
            raise Elsewhere
        raise mine
    r, text = next((r, problem["text"]) for r, problem in found.items())
    same = len(found) == size() and all(problem["text"] == text for problem in found.values())
    raise Agreed(text if same else f"rank {r}: {text}") from mine


def failed(code: int, say: Callable[[str], None]) -> int:
    """One of the ranks that failed says so: the first of them to come here. The exit code of all is that rank's.

    Args:
        code: exit code that fits this rank's error.
        say: called with the rank in words, where this is the one.
    """
    try:
        store = meet()
        if store.add("pycse/failed", 1) > 1:
            return int(store.get("pycse/failed/code"))
        store.set("pycse/failed/code", str(code))
    except (RuntimeError, UserError):  # the store ended with its process: better said twice than never
        pass
    say(f"rank {rank()}: ")
    return code


@contextmanager
def one_voice() -> Iterator[None]:
    """Output of Python code goes nowhere on other ranks than 0, whichever library prints or warns."""
    if size() == 1:
        yield
        return
    with ExitStack() as stack:
        if not first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


# ---- the group


def device(name: str) -> str:
    """The device of this rank: where there are several, each has the GPU of its number on its machine.

    Args:
        name: one of settings.DEVICES.

    Raises:
        UserError: fewer GPUs than processes; mps, which no two processes can join on.
    """
    processes, _, local = place()
    if processes == 1:
        return name
    import torch

    if name == "mps":
        raise UserError(f"--device mps runs one process, not {processes}; use --device cpu")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")  # accelerate launch --cpu
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    if name != "cuda" or not torch.cuda.is_available():
        return name
    if local >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"--device cuda: this machine has {gpus} GPU{'s' if gpus > 1 else ''}, fewer than its processes; start one "
            "a GPU, or use --device cpu"
        )
    return f"cuda:{local}"


def join(encoder_device: torch.device) -> None:
    """Make the group, before the trainer does, so that it waits as long as rank 0 evaluates."""
    if size() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        return
    if encoder_device.type == "cuda":
        torch.cuda.set_device(encoder_device)
    backend = "nccl" if encoder_device.type == "cuda" else "gloo"
    store = torch.distributed.PrefixStore(f"pycse/group/{next(_turns)}", meet())  # no addresses of an earlier group
    torch.distributed.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=WAITING)


def leave() -> None:
    """The end of a run: wait for all, and end the group."""
    exchange(None)
    if size() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def largest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each number over the ranks; they have a group."""
    if size() == 1:
        return values
    import torch

    most = torch.tensor(values, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return most.tolist()


def take_from_first(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors with rank 0's."""
    if size() > 1:
        import torch

        for name in sorted(tensors):
            torch.distributed.broadcast(tensors[name], 0)


def seed_dropout(seed: int) -> None:
    """Give every rank dropout masks of its own. Rank 0 goes on as one process would: transformers has seeded all alike,
    and the order of the text comes from generators of the trainer's own."""
    if not first():
        from transformers import set_seed

        set_seed((seed + rank()) % 2**32)
