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


def with_autocast(rank, group, exchange, function, rows=(4, 3)):
    """Under autocast, and with the embeddings cast before."""
    g = torch.Generator().manual_seed(rank)
    z1, z2 = torch.randn(rows[rank], 16, generator=g), torch.randn(rows[rank], 16, generator=g)
    given = {"group": group} | ({"exchange": exchange, "temperature": 0.01} if exchange else {})
    call = getattr(pycse, function)
    inputs = (z1,) if function == "uniformity" else (z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(*inputs, **given)
    return cast.item(), call(*(z.bfloat16() for z in inputs), **given).item()


@pytest.mark.parametrize("rows", [(4, 3), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "exchange, function",
    [("gather", "fused_infonce"), ("ring", "fused_infonce"), (None, "uniformity"), (None, "alignment")],
)
def test_autocast(ranks, exchange, function, rows):
    for cast, given in ranks.run(2, with_autocast, exchange, function, rows):
        assert cast == pytest.approx(given, rel=1e-6 if function != "alignment" else 2e-2, abs=1e-30)


def with_weights(rank, group, dtype):
    g = torch.Generator().manual_seed(rank)
    z1, z2 = torch.randn(5, 16, generator=g), torch.randn(5, 16, generator=g)
    weight = torch.ones(5, dtype=dtype)
    return pycse.fused_infonce(z1, z2, weight=weight, group=group).item(), pycse.fused_infonce(
        z1, z2, group=group
    ).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_not_rounded_on_their_way(ranks, dtype):
    for weighted, plain in ranks.run(3, with_weights, dtype):
        assert weighted == pytest.approx(plain, rel=1e-6)


def checkpointed(rank, group, reentrant):
    from torch.utils.checkpoint import checkpoint

    rows = (3, 0)[rank]
    W = torch.eye(8, requires_grad=True)
    z = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    loss = checkpoint(lambda a: pycse.fused_infonce(a @ W, a @ W, group=group), z, use_reentrant=reentrant)
    loss.backward()
    return W.grad.norm().item()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_rank_without_rows(ranks, reentrant):
    assert all(norm == norm for norm in ranks.run(2, checkpointed, reentrant))


def compiled_loss(rank, group, case):
    from shared_batches import on_rank

    return torch.compile(lambda: on_rank(rank, group, case)["loss"], backend="eager")()


@pytest.mark.parametrize("loss", ["distill", "distillcse", "sigmoid", "supcon", "uniformity", "alignment"])
def test_every_loss_breaks_the_graph(ranks, loss):
    from shared_batches import Shared, on_rank

    case = Shared((4, 5), loss)
    right = [one["loss"] for one in ranks.run(2, on_rank, case)]
    torch.testing.assert_close(ranks.run(2, compiled_loss, case), right)


def of_inference_mode(rank, group, exchange):
    with torch.inference_mode():
        z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    temperature = torch.tensor(0.1, requires_grad=True)
    pycse.fused_infonce(z, z, temperature, group=group, exchange=exchange).backward()
    return temperature.grad.item()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_embeddings_of_inference_mode(ranks, exchange):
    first, second = ranks.run(2, of_inference_mode, exchange)
    assert first == second != 0
