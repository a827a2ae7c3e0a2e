"""Sparse layers saved, loaded, averaged, moved and spread over processes by PyTorch's own tools."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sparse_layers import NAMES, layer, random_mask
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from pycse.sparse import SparseLinear, masked_linear

PATTERNS = ["unstructured", "block16", "dense"]
SIDES = {name: side for side, name in NAMES.items()}
x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def model(pattern, density=0.4):
    side = SIDES.get(pattern, 1)
    return nn.Sequential(
        layer(48, 64, side, density, pattern=pattern)[1], nn.ReLU(), layer(32, 48, side, density, pattern=pattern)[1]
    )


def same(ours, truth):
    torch.testing.assert_close(ours(x), truth(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.modules(), truth.modules()):
        if isinstance(a, SparseLinear):
            assert torch.equal(a.mask, b.mask) and torch.equal(a.mask_bits, b.mask_bits) and a.chosen == b.chosen


@pytest.mark.parametrize("pattern", PATTERNS)
def test_distributed_checkpoints_in_one_process(pattern, tmp_path):
    first = model(pattern)
    optimizer = torch.optim.AdamW(first.parameters())
    first(x).sum().backward()
    optimizer.step()
    first[0].mask[16:] = False  # unseen so far: neither forward nor anything else has run since
    state = get_model_state_dict(first)
    assert [name for name in state if name.endswith("mask_bits")] == ["0.mask_bits", "2.mask_bits"]
    for options in (None, StateDictOptions(full_state_dict=True, cpu_offload=True)):
        other = model(pattern, 1)
        set_model_state_dict(other, get_model_state_dict(first, options=options), options=options)
        same(other, first)
    other = model(pattern, 1)
    adam = torch.optim.AdamW(other.parameters())
    weights, moments = get_state_dict(first, optimizer)
    set_state_dict(other, adam, model_state_dict=weights, optim_state_dict=moments)
    same(other, first)
    dcp.save({"model": get_model_state_dict(first)}, checkpoint_id=tmp_path)
    for through_setter in (False, True):
        other = model(pattern, 1)
        state = {"model": get_model_state_dict(other)}
        dcp.load(state, checkpoint_id=tmp_path)  # in place
        if through_setter:
            set_model_state_dict(other, state["model"])
        same(other, first)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_buffer_that_changed_counts(pattern):
    ours, other = model(pattern)[0], model(pattern, 1)[0]
    other.mask[:16] = False
    given = other.state_dict()["mask_bits"]
    for change in (
        lambda m: m.mask_bits.copy_(given),
        lambda m: m.mask.copy_(other.mask),
        lambda m: m._buffers.update(mask_bits=given.clone()),
        lambda m: [a.copy_(b) for a, b in zip(m.buffers(), other.buffers())],
        lambda m: (m.mask_bits.zero_(), m.mask.copy_(other.mask)),
        lambda m: (m.mask.zero_(), m.load_state_dict(other.state_dict())),
    ):
        changed = copy.deepcopy(ours)
        change(changed)
        truth = F.linear(x, dict(changed.named_parameters())["weight"] * other.mask, changed.bias)
        torch.testing.assert_close(changed(x), truth)
        assert torch.equal(changed.mask, other.mask) and torch.equal(changed.state_dict()["mask_bits"], given)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_averages(pattern):
    source = model(pattern)
    averaged, buffers = AveragedModel(source), AveragedModel(source, use_buffers=True)
    averaged.update_parameters(source)
    source[0].mask[16:] = False
    averaged.update_parameters(source)
    same(averaged.module, source)
    twin = copy.deepcopy(source)
    source[2].mask[:, :16] = False
    for a, b in zip(twin.buffers(), source.buffers()):
        a.copy_(b)
    same(twin, source)
    buffers.update_parameters(source)
    with pytest.raises(RuntimeError, match="two bool tensors"):  # masks have no average: the default copies them
        buffers.update_parameters(source)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_without_values(pattern, autocast):
    made = model(pattern)[0]
    on = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with on, torch.device("meta"):
        hollow, dense, given = SparseLinear(64, 48, pattern=pattern), nn.Linear(64, 48), torch.randn(5, 64)
        mask = torch.ones(48, 64, dtype=torch.bool)
        for y in (hollow(given), made.to("meta")(given), masked_linear(given, hollow.weight, mask, hollow.bias)):
            assert (y.device, y.dtype, y.shape) == (given.device, dense(given).dtype, (5, 48))
    with on, FakeTensorMode():
        fake, given = SparseLinear(64, 48, pattern=pattern), torch.randn(5, 64)
        assert fake(given).dtype == nn.Linear(64, 48)(given).dtype and fake(given).shape == (5, 48)
    made = model(pattern)[0]
    with on, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert made(mode.from_tensor(x)).dtype == (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_that_come_later(pattern):
    made = model(pattern)
    with torch.device("meta"):
        hollow = nn.Sequential(SparseLinear(64, 48, pattern=pattern), nn.ReLU(), SparseLinear(48, 32, pattern=pattern))
    assigned = copy.deepcopy(hollow)
    with pytest.raises(RuntimeError, match="0.mask_bits must be in the state_dict of a layer whose mask has no values"):
        assigned.load_state_dict({k: t for k, t in made.state_dict().items() if "bits" not in k}, assign=True)
    assigned.load_state_dict(made.state_dict(), assign=True)
    same(assigned, made)
    for name, t in made.state_dict().items():  # one by one, as accelerate does it
        place, _, child = name.rpartition(".")
        kept = hollow.get_submodule(place)
        if child in kept._parameters:
            kept._parameters[child] = nn.Parameter(t.clone())
        else:
            kept._buffers[child] = t.clone()
    same(hollow, made)
    before = made[0].mask.clone()
    made.to_empty(device="cpu")  # of values, not of what is known of the mask
    assert torch.equal(made[0].mask, before)
    empty = model(pattern).to("meta").to_empty(device="cpu")
    assert empty[0].mask.all()


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    made = model("unstructured")
    torch.save(made.state_dict(), tmp_path / "model.pt")
    with accelerate.init_empty_weights():
        hollow = nn.Sequential(
            SparseLinear(64, 48, pattern="unstructured"), nn.ReLU(), SparseLinear(48, 32, pattern="unstructured")
        )
    accelerate.load_checkpoint_and_dispatch(hollow, str(tmp_path / "model.pt"), device_map={"": "cpu"})
    same(hollow, made)


def test_masks_and_weights_changed_in_inference_mode():
    for pattern in PATTERNS:
        side = SIDES.get(pattern, 1)
        with torch.inference_mode():
            built = SparseLinear.from_dense(nn.Linear(64, 48), random_mask(48, 64, side, 0.4), pattern)
        for change in (
            lambda m: None,
            lambda m: m.mask[16:].zero_(),
            lambda m: setattr(m, "mask", random_mask(48, 64, side, 0.7, seed=3)),  # noqa: B023
            lambda m: m.load_state_dict(layer(48, 64, side, 0.7, pattern=pattern)[1].state_dict()),  # noqa: B023
            lambda m: m.weight.add_(1),
        ):
            with torch.inference_mode():
                change(built)
                inside = built(x)
            given = x.clone().requires_grad_()
            truth = F.linear(given, built.weight * built.mask, built.bias)
            torch.testing.assert_close(inside, truth)
            for eager in (built(given), truth):
                (ours,) = torch.autograd.grad(eager.sin().sum(), built._parameters["weight"], retain_graph=True)
                assert not (ours * ~built.mask).any() and ours.any()
            built.mask[:, :16] = False
            torch.testing.assert_close(built(x), F.linear(x, built.weight * built.mask, built.bias))
        with torch.inference_mode():
            built = SparseLinear(64, 48, pattern=pattern)
        try:
            (ours,) = torch.autograd.grad(built(given).sum(), given)
        except RuntimeError as error:  # as of nn.Linear's own
            assert "Inference tensors cannot be saved for backward" in str(error)
        else:
            torch.testing.assert_close(ours, built.weight.sum(0).expand(5, 64))


def worker(folder):
    """One of two processes: FSDP2, FSDP and DDP train what a single process trains, and save and load it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    full = StateDictOptions(full_state_dict=True)

    def sharded(module):
        from torch.distributed.fsdp import fully_shard

        fully_shard(module[0], mesh=mesh)
        return fully_shard(module, mesh=mesh)

    def trained(wrap, change):
        """What ``wrap`` makes of a model after some steps, and the same in one process. Momentum stays where weights
        went."""
        alone = model(pattern)
        together = wrap(copy.deepcopy(alone))
        g = torch.Generator().manual_seed(1)
        steps = [torch.randn(6, 64, generator=g) for _ in range(4)]
        for m in (alone, together):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
            for k, batch in enumerate(steps):
                optimizer.zero_grad()
                m(batch).square().sum().backward()
                optimizer.step()
                if k == 1 and change:
                    m[0].mask[:16], m[2].mask[16:] = False, False
        torch.testing.assert_close(together(x), alone(x), rtol=1e-4, atol=1e-5)
        state = get_model_state_dict(together, options=full)
        if rank == 0:
            truth = alone.state_dict()
            assert list(state) == list(truth) and torch.equal(state["0.mask_bits"], truth["0.mask_bits"])
            torch.testing.assert_close(state["0.weight"], truth["0.weight"], rtol=1e-3, atol=1e-4)
            assert not state["0.weight"][~alone[0].mask].any()
        return together, alone

    for pattern in PATTERNS:
        trained(lambda m: FSDP(m, use_orig_params=True, device_id=torch.device("cpu")), False)
        trained(lambda m: FSDP(m, use_orig_params=False, device_id=torch.device("cpu")), False)
        local = model(pattern, 1 if rank else 0.4)  # DDP takes the first process's
        replicas, truth = nn.parallel.DistributedDataParallel(local), model(pattern)
        replicas(x)
        same(local, truth)
        truth[0].mask[16:] = False
        if rank == 0:
            local[0].mask[16:] = False
        replicas(x).sum().backward()
        same(local, truth)
        assert not local[0]._parameters["weight"].grad[16:].any()
        if not hasattr(torch.compiler, "is_exporting"):  # FSDP2 runs on the CPU from torch 2.7 on
            continue
        together, alone = trained(sharded, True)
        dcp.save({"model": get_model_state_dict(together)}, checkpoint_id=f"{folder}/{pattern}")
        for fresh in (sharded(model(pattern, 1)), model(pattern, 1)):
            state = {"model": get_model_state_dict(fresh)}
            dcp.load(state, checkpoint_id=f"{folder}/{pattern}")
            set_model_state_dict(fresh, state["model"])
            torch.testing.assert_close(fresh(x), alone(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(fresh[0].mask, alone[0].mask)
        with torch.device("meta"):
            hollow = nn.Sequential(*(SparseLinear(*s, pattern=pattern) for s in ((64, 48), (48, 32))))
        hollow.insert(1, nn.ReLU())
        for fresh in (sharded(model(pattern, 1)), hollow):
            first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(fresh, alone.state_dict() if rank == 0 else {}, options=first)
            torch.testing.assert_close(fresh(x), alone(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(fresh[2].mask, alone[2].mask)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # PyTorch's own threads may be alive still, and now and then abort a process that ends


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = f"import test_sparse_checkpoints as t; t.worker({str(tmp_path)!r})"
    both = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", code],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [p.communicate(timeout=240)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], "\n".join(output)


def test_what_an_earlier_version_pickled():
    """Its kernels' lists were buffers, and the packed mask was none."""
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = SparseLinear(8, 6, mask=mask, pattern="unstructured")
    state = layer.__getstate__()
    kept = {name: t for name, t in state["_buffers"].items() if name != "mask_bits"}
    state = {**state, "_buffers": {**kept, **dict.fromkeys(("ptr", "cols", "t_ptr", "t_rows", "plan", "t_plan"))}}
    state |= {"chosen": "dense", "reason": "as asked", "_source": None}
    old = SparseLinear.__new__(SparseLinear)
    old.__setstate__(state)
    x = torch.randn(3, 8)
    torch.testing.assert_close(old(x), layer(x))
    assert set(old.state_dict()) == set(layer.state_dict()) and torch.equal(old.mask, mask)
