"""SparseLinear as a module: training, state, copies, casts, and what it and masked_linear refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import expected, layer, random_mask
from torch import nn

from pycse.pattern import Pattern, pack_mask, unpack_mask
from pycse.sparse import SparseLinear, masked_linear


@pytest.mark.clean_memory
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_compile_full_graph(pattern, dynamic):
    torch._dynamo.reset()
    _, sparse = layer(pattern=pattern)
    traced = torch.compile(copy.deepcopy(sparse), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 4, 5):
        results = []
        for module in (sparse, traced):
            x = torch.linspace(-1, 1, T * 96).view(T, 96).requires_grad_()
            module.weight.grad = None
            y = module(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, module.weight.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_autocast(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(9, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, truth = sparse(x), expected(dense, sparse.mask, x)
        y2 = masked_linear(x, dense.weight, sparse.mask, dense.bias)
    assert y.dtype == y2.dtype == torch.bfloat16
    torch.testing.assert_close(y, truth, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y2, truth, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == sparse.weight.grad.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_training_keeps_zeros(pattern):
    dense, sparse = layer(pattern=pattern)
    before = sparse.weight.detach().clone()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(torch.randn(7, 96)).square().sum().backward()
        assert (sparse.weight.grad[~sparse.mask] == 0).all() and (sparse.weight.grad[sparse.mask] != 0).any()
        optimizer.step()
    assert (sparse.weight[~sparse.mask] == 0).all()
    assert (sparse.weight[sparse.mask] != before[sparse.mask]).any()
    assert (dense.weight[~sparse.mask] != 0).any()  # the original is as it was
    x = torch.randn(5, 96)
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), F.linear(x, sparse.weight, sparse.bias))
        plain = sparse.densify()
        assert type(plain) is torch.nn.Linear and not plain.training
        torch.testing.assert_close(plain(x), sparse(x))


def test_from_dense_copies():
    dense, _ = layer(dtype=torch.float64)
    dense.weight.requires_grad_(False)
    dense.eval()
    sparse = SparseLinear.from_dense(dense, random_mask(64, 96, 16, 0.5))
    assert not sparse.training and not sparse.weight.requires_grad and sparse.bias.requires_grad
    assert sparse.weight.dtype == torch.float64 and sparse.weight.data_ptr() != dense.weight.data_ptr()
    assert isinstance(sparse, torch.nn.Linear) and list(sparse.state_dict()) == ["weight", "bias", "mask_bits"]
    back = sparse.densify()
    assert not back.weight.requires_grad and torch.equal(back.weight, dense.weight * sparse.mask)


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16"])
def test_state_dict_with_another_mask(pattern):
    _, sparse = layer(pattern=pattern)
    _, other = layer(density=0.8, pattern=pattern)
    x = torch.randn(5, 96)
    for assign in (False, True):
        target = copy.deepcopy(sparse)
        target(x)
        target.load_state_dict(other.state_dict(), assign=assign)
        torch.testing.assert_close(target(x), other(x))
        assert target.chosen == other.chosen and torch.equal(target.mask, other.mask)
        assert (target.weight[~target.mask] == 0).all()
    fresh = SparseLinear(96, 64, pattern=pattern)
    fresh.load_state_dict(other.state_dict())
    torch.testing.assert_close(fresh(x), other(x))
    with torch.device("meta"):
        hollow = SparseLinear(96, 64, pattern=pattern)
    hollow.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(hollow(x), other(x))


def test_state_dict_that_does_not_fit():
    _, sparse = layer(pattern="block16")
    before = {name: t.clone() for name, t in sparse.state_dict().items()}
    for bits, words in (
        (pack_mask(random_mask(64, 96, 1, 0.5)), "whole 16 x 16 blocks"),
        (torch.ones(64, 96), r"mask_bits must be an int32 tensor of shape \(64, 3\), got a torch.float32"),
        (pack_mask(random_mask(64, 128, 16, 0.5)), r"mask_bits must be bits of shape \(64, 3\) .* got \(64, 4\)"),
    ):
        with pytest.raises(RuntimeError, match=words):
            sparse.load_state_dict({**before, "weight": torch.zeros(64, 96), "mask_bits": bits})
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        sparse.load_state_dict({"weight": before["weight"]})
    assert all(torch.equal(before[name], t) for name, t in sparse.state_dict().items())


def test_state_dict_of_a_dense_layer():
    dense, sparse = layer()
    sparse.load_state_dict(dense.state_dict())  # the mask stays
    assert torch.equal(sparse.weight, dense.weight * sparse.mask) and sparse.density < 0.5


def test_a_mask_changed_in_place_is_seen():
    dense, sparse = layer(block=1)
    x = torch.randn(5, 96)
    sparse(x)
    sparse.mask[:32] = False
    torch.testing.assert_close(sparse(x), expected(dense, sparse.mask, x))
    assert (sparse.weight[:32] == 0).all()
    sparse.mask = random_mask(64, 96, 1, 0.1, seed=9)
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight * sparse.mask, sparse.bias))
    sparse.mask = torch.ones(64, 96)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        sparse(x)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_momentum_of_what_is_removed_later(pattern):
    """The optimizer goes on moving a weight that had momentum before its mask fell."""
    _, sparse = layer(pattern=pattern, density=1)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    x = torch.randn(5, 96)
    for step in range(3):
        sparse(x).square().sum().backward()
        optimizer.step()
        if step == 0:
            sparse.mask[:32] = False
    assert dict(sparse.named_parameters())["weight"][:32].any()
    torch.testing.assert_close(sparse(x), expected(sparse, sparse.mask, x))
    for loaded in (sparse.state_dict()["weight"], sparse.densify().weight):
        assert not loaded[:32].any() and loaded[32:].all()


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_merged_adapters(pattern):
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    sparse(x)
    sparse.weight.data += 1
    assert not copy.deepcopy(sparse).state_dict()["weight"][~sparse.mask].any()
    sparse.eval()
    torch.testing.assert_close(sparse(x), expected(sparse, sparse.mask, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_activation_checkpointing(pattern, reentrant):
    _, sparse = layer(pattern=pattern)
    results = []
    for call in (sparse, lambda x: torch.utils.checkpoint.checkpoint(sparse, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 1, 5 * 96).view(5, 96).requires_grad_()
        sparse.zero_grad()
        call(x.sin()).square().sum().backward()
        results.append((x.grad, sparse.weight.grad, sparse.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_weights_of_others(pattern):
    """Tensors in the place of the weight are masked, and are not written to."""
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in sparse.named_parameters()}
    before = {name: t.detach().clone() for name, t in given.items()}
    y = torch.func.functional_call(sparse, given, (x,))
    torch.testing.assert_close(y, F.linear(x, before["weight"] * sparse.mask, before["bias"]))
    y.square().sum().backward()
    assert all(torch.equal(before[name], t) for name, t in given.items())
    assert not given["weight"].grad[~sparse.mask].any() and given["weight"].grad[sparse.mask].any()
    if sparse.chosen == "dense":
        loss = lambda w: torch.func.functional_call(sparse, w, (x,)).square().sum()  # noqa: E731
        torch.testing.assert_close(torch.func.grad(loss)(before)["weight"], given["weight"].grad)
        each = torch.func.vmap(torch.func.grad(lambda x: sparse(x).square().sum()))(x)
        x.requires_grad_()
        torch.testing.assert_close(each, torch.autograd.grad(sparse(x).square().sum(), x)[0])


def test_two_forwards_before_a_backward():
    _, sparse = layer(pattern="dense")
    x = torch.randn(5, 96)
    first = sparse(x.requires_grad_())
    sparse.mask = sparse.mask.clone()
    (first.sum() + sparse(x).sum()).backward()
    assert not sparse.weight.grad[~sparse.mask].any()


@pytest.mark.parametrize("pattern", ["auto", "unstructured", "block16", "dense"])
def test_casts_and_empty_storage(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    wide = copy.deepcopy(sparse).type(torch.float64)  # casts buffers as well
    torch.testing.assert_close(wide(x.double()).float(), expected(dense, sparse.mask, x))
    with torch.device("meta"):
        hollow = SparseLinear(96, 64, pattern=pattern)
    hollow.to_empty(device="cpu").load_state_dict(sparse.state_dict())
    torch.testing.assert_close(hollow(x), sparse(x))
    assert hollow.chosen == sparse.chosen


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_copies(pattern, tmp_path):
    _, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    y = sparse(x)
    torch.save(sparse, tmp_path / "layer.pt")
    for other in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ):
        torch.testing.assert_close(other(x), y)
        assert other.chosen == sparse.chosen and other.mask.dtype == torch.bool
        with torch.no_grad():
            other.weight.zero_()
    torch.testing.assert_close(sparse(x), y)


@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_to(pattern):
    dense, sparse = layer(pattern=pattern)
    x = torch.randn(5, 96)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        moved = copy.deepcopy(sparse).to(dtype)
        assert moved.mask.dtype == torch.bool and moved.weight.dtype == dtype
        y = moved(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected(dense, sparse.mask, x), rtol=tolerance, atol=tolerance)
    hollow = copy.deepcopy(sparse).to("meta")
    assert hollow.mask.is_meta and "dense" in repr(hollow)


def test_repr_says_pattern_density_and_why_dense():
    assert "pattern=block16, density=100.0%" in repr(SparseLinear(32, 16, pattern="block16"))
    text = repr(SparseLinear(33, 17))
    assert "pattern=dense, density=100.0% (dense: density 100.0%; for cpu float32 sparse pays below" in text
    assert "out_features must be a multiple of the block 16, got 17" in text
    assert "backend=torch" in repr(SparseLinear(33, 17, backend="torch"))


def fixed_layer(**options):
    torch.manual_seed(0)
    layer = SparseLinear.from_dense(nn.Linear(200, 96), random_mask(96, 200, 1, 0.3), "unstructured", **options)
    return layer.eval(), torch.randn(150, 200)


def changed_values(layer):
    """Ways in which a weight changes, as (name, change)."""
    optimizer = torch.optim.SGD([layer.weight], 0.1)

    def step():
        with torch.enable_grad():
            layer(torch.randn(150, 200)).square().mean().backward()
        optimizer.step()

    def reload():
        layer.load_state_dict(SparseLinear.from_dense(nn.Linear(200, 96), layer.mask).state_dict())

    return [
        ("step", step),
        ("add", lambda: layer.weight.add_(1)),
        ("data written", lambda: layer.weight.data.mul_(2)),
        ("data replaced", lambda: setattr(layer.weight, "data", torch.randn(96, 200))),
        ("parameter replaced", lambda: setattr(layer, "weight", nn.Parameter(torch.randn(96, 200)))),
        ("state_dict", reload),
        ("mask", lambda: layer.mask.copy_(random_mask(96, 200, 1, 0.2))),
        ("columns", lambda: setattr(layer.weight, "data", torch.randn(200, 96).t())),
    ]


@torch.no_grad()
def test_weights_that_stay_are_packed_once_and_again_when_they_change():
    layer, x = fixed_layer()
    layer.train()
    before = layer(x)
    assert layer._made is None
    assert torch.equal(layer.eval()(x), before) and layer._made is not None
    packed = layer._made[2].packed
    assert packed.shape == (layer.mask.sum(),) and torch.equal(layer(x), before) and layer._made[2].packed is packed
    for name, change in changed_values(layer):
        change()
        expected = F.linear(x, layer.weight.masked_fill(~layer.mask, 0), layer.bias)
        torch.testing.assert_close(layer(x), expected, msg=lambda m, name=name: f"{name}: {m}")
    layer.weight.data[0, layer.mask[0].nonzero()[0]] = 100  # one weight, which may go unnoticed until then
    expected = F.linear(x, layer.weight.masked_fill(~layer.mask, 0), layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_packed_weights_are_for_plain_inference():
    layer, x = fixed_layer()
    layer(x).sum().backward()
    assert layer._made is None and layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        exact = layer(x)
        torch.testing.assert_close(
            torch.func.functional_call(layer, {"weight": 2 * layer.weight}, x), 2 * exact - layer.bias
        )
        assert torch.equal(copy.deepcopy(layer)(x), exact) and copy.deepcopy(layer)._made is None
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            other = copy.deepcopy(layer).to(dtype)
            torch.testing.assert_close(other(x.to(dtype)).float(), exact, atol=0.05, rtol=0.05)
            assert other._made[2].packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for backend in ("torch", "reference"):
            plain, _ = fixed_layer(backend=backend)
            torch.testing.assert_close(plain(x), exact)
            assert plain._made[2].packed is None
        blocks = SparseLinear.from_dense(nn.Linear(64, 64), torch.ones(64, 64, dtype=torch.bool), "block32").eval()
        blocks(torch.randn(70, 64))
        assert blocks._made is None
    with torch.inference_mode():
        assert torch.equal(layer(x), exact)
        made_here = SparseLinear.from_dense(nn.Linear(200, 96), layer.mask, "unstructured").eval()
        made_here.weight.copy_(layer.weight), made_here.bias.copy_(layer.bias)
        assert torch.equal(made_here(x), exact)
        made_here.weight.mul_(3)
        torch.testing.assert_close(made_here(x), 3 * exact - 2 * layer.bias)


def test_a_changed_mask_is_another_mask():
    """Nothing of a mask is kept between calls, so that no way of writing to it goes unnoticed."""
    x, weight = torch.randn(4, 40), torch.randn(16, 40)
    mask = torch.ones(16, 40, dtype=torch.bool)

    def check():
        torch.testing.assert_close(masked_linear(x, weight, mask), F.linear(x, weight * mask))

    check()
    mask[3] = False
    check()
    mask.data[5:9, ::2] = False
    check()
    mask.numpy()[:, 1] = False
    check()
    with torch.inference_mode():
        mask[10] = False
        check()


def test_a_mask_takes_a_bit_a_weight():
    _, sparse = layer(256, 96)
    state = sparse.state_dict()
    assert state["mask_bits"].nbytes * 8 == 256 * 96 and torch.equal(unpack_mask(state["mask_bits"], 96), sparse.mask)


x96, w96, m96 = torch.randn(4, 96), torch.randn(64, 96), torch.ones(64, 96, dtype=torch.bool)
BAD = [
    (lambda: masked_linear(x96, w96, m96[:, 1:]), ValueError, r"mask must have the weight's shape \(64, 96\), got \(64, 95\)"),
    (lambda: masked_linear(x96, w96, m96.float()), TypeError, r"mask must be a bool tensor .* got a torch.float32"),
    (lambda: masked_linear(x96, w96, [True]), TypeError, r"mask must be a bool tensor"),
    (lambda: masked_linear(x96, w96, pack_mask(m96)[:, :2]), ValueError, r"bits of shape \(64, 3\).* got \(64, 2\)"),
    (lambda: masked_linear(x96, w96, m96.to("meta")), ValueError, r"mask must be on the weight's device cpu, got meta"),
    (lambda: masked_linear(x96[:, 1:], w96, m96), ValueError, r"x must have the weight's 96 features last, got .*95"),
    (lambda: masked_linear(x96.double(), w96, m96), TypeError, r"weight must have x's dtype torch.float64"),
    (lambda: masked_linear(x96, w96, m96, torch.randn(63)), ValueError, r"bias must have shape \(64,\), got \(63,\)"),
    (lambda: masked_linear(x96, w96, m96, torch.randn(64).double()), TypeError, r"bias must have x's dtype"),
    (lambda: masked_linear(x96.long(), w96, m96), TypeError, r"x must be float32.* got torch.int64"),
    (lambda: masked_linear(x96.to_sparse(), w96, m96), TypeError, r"x must be a dense tensor, got torch.sparse_coo"),
    (lambda: masked_linear(x96, w96[0], m96[0]), ValueError, r"weight must have 2 dimensions"),
    (lambda: masked_linear(x96, w96, m96, backend="mkl"), ValueError, r"backend must be one of .* got 'mkl'"),
    (lambda: masked_linear(x96, w96, m96, backend="cuda"), RuntimeError, r"backend='cuda' cannot run here"),
    (lambda: SparseLinear(96, 64, mask=m96.t()), ValueError, r"mask must have the weight's shape"),
    (lambda: SparseLinear(96, 64, pattern="block8"), ValueError, r"pattern must be one of .* got 'block8'"),
    (lambda: SparseLinear(96, 64, backend="fast"), ValueError, r"backend must be one of"),
    (lambda: SparseLinear(96, 72, pattern="block16"), ValueError, r"out_features must be a multiple of the block 16, got 72"),
    (lambda: SparseLinear(96, 64, pattern="block64"), ValueError, r"in_features must be a multiple of the block 64, got 96"),
    (lambda: SparseLinear(96, 64, mask=random_mask(64, 96, 1, 0.5), pattern="block32"), ValueError, r"whole 32 x 32 blocks .* \(64, 96\)"),
    (lambda: SparseLinear(96, 64, pattern="2:4"), ValueError, r"pattern '2:4' cannot be used: 2:4 runs on NVIDIA GPUs"),
    (lambda: SparseLinear.from_dense(torch.nn.Conv1d(1, 1, 1), m96), TypeError, r"linear must be a torch.nn.Linear, got Conv1d"),
    (lambda: SparseLinear.from_dense(torch.nn.Linear(96, 64), None), TypeError, r"mask must be a bool tensor"),
    (lambda: SparseLinear(96, 64)(torch.randn(3, 64)), ValueError, r"x must have the weight's 96 features last"),
    (lambda: SparseLinear(96, 64)(x96.bfloat16()), TypeError, r"weight must have x's dtype torch.bfloat16"),
    (lambda: Pattern.from_mask(m96, 8), ValueError, r"block must be 1, 16, 32 or 64, got 8"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unlike_devices():
    with pytest.raises(ValueError, match="weight must be on x's device cpu, got meta"):
        masked_linear(x96, w96.to("meta"), m96.to("meta"))
