"""Training with several processes: DDP in all its ways, fully_shard, torch.compile, against one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pycse

ROWS, FEATURES, STEPS = (5, 3), 12, 3


def batches(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(2, sum(ROWS), FEATURES, generator=g)


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 8))


def step_of(model, loss, x, optimizer, accumulate=1):
    (loss(model(x[0]), model(x[1])) / accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()


def in_one_process(accumulate=1):
    model, temperature = encoder(), nn.Parameter(torch.tensor(0.1))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    for step in range(STEPS):
        for k in range(accumulate):
            x = batches(step * accumulate + k)
            (pycse.fused_focal_infonce(model(x[0]), model(x[1]), temperature) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in (*model.parameters(), temperature)]


def trained(rank, group, how):
    model, temperature = encoder(), nn.Parameter(torch.tensor(0.1))
    accumulate = 2 if how == "no_sync" else 1
    begin = sum(ROWS[:rank])
    parameters = list(model.parameters())
    if how == "fully_shard":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        parameters = list(model.parameters())
    else:
        model = DistributedDataParallel(model, process_group=group, static_graph=how == "static graph")
    loss = lambda q, d: pycse.fused_focal_infonce(q, d, temperature, group=group)  # noqa: E731
    if how == "compiled":
        call = torch.compile(lambda x: loss(model(x[0]), model(x[1])), backend="aot_eager")
    else:
        call = lambda x: loss(model(x[0]), model(x[1]))  # noqa: E731
    optimizer = torch.optim.SGD([*parameters, temperature], lr=0.1)
    for step in range(STEPS):
        for k in range(accumulate):
            x = batches(step * accumulate + k)[:, begin : begin + ROWS[rank]]
            if how == "no_sync" and k + 1 < accumulate:
                with model.no_sync():
                    (call(x) / accumulate).backward()
            else:
                (call(x) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return [p.detach() for p in (*values, temperature)]


@pytest.mark.parametrize("how", ["ddp", "static graph", "no_sync", "fully_shard", "compiled"])
def test_parameters_are_those_of_one_process(ranks, how):
    right = in_one_process(2 if how == "no_sync" else 1)
    for ours in ranks.run(len(ROWS), trained, how):
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def without_gradients(rank, group):
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        return pycse.fused_infonce(z.requires_grad_(), z, group=group).requires_grad


def test_no_grad(ranks):
    assert ranks.run(2, without_gradients) == [False, False]


def twice(rank, group):
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    loss = pycse.fused_infonce(z, z, group=group)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    return (first - second).abs().max().item(), first.abs().max().item()


def test_backward_twice(ranks):
    for off, size in ranks.run(2, twice):
        assert off <= 1e-6 * size and size > 0


def second_derivative(rank, group):
    z = torch.randn(4, 8).requires_grad_()
    loss = pycse.fused_infonce(z, z, group=group)
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    first.sum().backward()


def test_second_derivatives_are_refused(ranks):
    for fine, result in ranks.outcomes(2, second_derivative):
        assert not fine and result[0] is RuntimeError
