"""Sparse layers and their operators under torch.func's transforms, forward-mode AD and vmap: as F.linear of W ⊙ M."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import NAMES, layer, random_mask
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from pycse.ops import sparse as ops
from pycse.pattern import pack_mask
from pycse.sparse import masked_linear

PATTERNS = ["unstructured", "block16", "block32", "dense"]
SIDES = {name: side for side, name in NAMES.items()}


def pair(pattern, dtype=torch.float64):
    """A sparse layer whose removed weights hold what counts as 0, the same dense, x, and a direction."""
    _, sparse = layer(32, 64, SIDES.get(pattern, 1), 0.4, dtype=dtype, pattern=pattern)
    dense = sparse.densify()
    dict(sparse.named_parameters())["weight"].data.add_(~sparse.mask)
    dense.mask = sparse.mask
    return sparse, dense, torch.randn(2, 64, dtype=dtype), torch.randn(2, 64, dtype=dtype)


def of_duals(module, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, t))).tangent


def of_weights(module, x, t):
    """First and second derivatives by weights whose removed part is not 0, and neither is the direction's."""
    weights = {"weight": torch.linspace(-1, 1, 32 * 64, dtype=x.dtype).view(32, 64), "bias": module.bias.detach()}
    directions = {name: w.cos() for name, w in weights.items()}

    def loss(weights):
        kept = weights["weight"] * module.mask if type(module) is nn.Linear else weights["weight"]
        return functional_call(module, {**weights, "weight": kept}, (x,)).sin().sum()

    return grad(loss)(weights), jvp(grad(loss), (weights,), (directions,))


WAYS = {
    "jvp": lambda m, x, t: jvp(m, (x,), (t,)),
    "vjp": lambda m, x, t: vjp(m, x)[1](m(t)),
    "jacfwd": lambda m, x, t: jacfwd(m)(x),
    "jacrev": lambda m, x, t: jacrev(m)(x),
    "hessian": lambda m, x, t: hessian(lambda z: m(z).sin().sum())(x),
    "vmap": lambda m, x, t: vmap(m)(x),
    "vmap of grad": lambda m, x, t: vmap(grad(lambda z: m(z).sin().sum()))(x),
    "vmap over no dimension of x": lambda m, x, t: vmap(lambda k: m(x) * k)(torch.arange(3)),
    "duals": of_duals,
    "weights": of_weights,
    "jacobian": lambda m, x, t: torch.autograd.functional.jacobian(m, x),
    "jacobian, vectorized": lambda m, x, t: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "jacobian, forward": lambda m, x, t: torch.autograd.functional.jacobian(
        m, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian, vectorized": lambda m, x, t: torch.autograd.functional.hessian(
        lambda z: m(z).sin().sum(), x, vectorize=True
    ),
    "hvp": lambda m, x, t: torch.autograd.functional.hvp(lambda z: m(z).sin().sum(), x, t),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers(pattern, way):
    sparse, dense, x, t = pair(pattern)
    torch.testing.assert_close(WAYS[way](sparse, x, t), WAYS[way](dense, x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_of_other_types(dtype):
    sparse, dense, x, t = pair("unstructured", dtype)
    for way in ("jvp", "vmap", "duals"):
        torch.testing.assert_close(WAYS[way](sparse, x, t), WAYS[way](dense, x, t), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ensembles(pattern):
    """Stacked weights under masks of their own, whose patterns keep unlike numbers of weights."""
    x, side = torch.randn(5, 64), SIDES.get(pattern, 1)
    members = [layer(32, 64, side, density, pattern=pattern)[1] for density in (0.2, 0.6, 1)]
    for k, member in enumerate(members):
        dict(member.named_parameters())["weight"].data.mul_(k + 1).add_(~member.mask)
    state = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    y = vmap(lambda *state: functional_call(base, state, (x,)))(*state)
    torch.testing.assert_close(y, torch.stack([member(x) for member in members]))


def operators(name, backend):
    """(what to call, the same in PyTorch's operators, arguments) of an operator and its two gradients."""
    side = SIDES.get(name, 1)
    mask = random_mask(16, 32, side, 0.4)
    which = (pack_mask(mask),) if name == "bits" else (*ops.pattern_of(mask, side).tensors, side)
    stem = "masked_linear" if name == "bits" else "sparse_linear"
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    for suffix, dense, args in (
        ("", lambda x, w, b: F.linear(x, w * mask, b), (new(3, 32), new(16, 32), new(16))),
        ("_dx", lambda dy, w: dy @ (w * mask), (new(3, 16), new(16, 32))),
        ("_dw", lambda dy, x: dy.t() @ x * mask, (new(3, 16), new(3, 32))),
    ):
        op = getattr(torch.ops.pycse, stem + suffix)
        yield lambda *args, op=op: op(*args, *which, backend), dense, args


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("name", ["unstructured", "block16", "bits"])
def test_operators(name, backend):
    for op, dense, args in operators(name, backend):
        every, directions = tuple(range(len(args))), tuple(a.cos() for a in args)
        rows = (0, *[None] * (len(args) - 1))
        for way in (
            lambda f: jvp(f, args, directions),  # noqa: B023
            lambda f: jacfwd(f, every)(*args),  # noqa: B023
            lambda f: jacrev(f, every)(*args),  # noqa: B023
            lambda f: vmap(f, rows)(torch.stack([args[0], args[0].sin()]), *args[1:]),  # noqa: B023
            lambda f: vmap(f)(*(torch.stack([a, a.sin()]) for a in args)),  # noqa: B023
            lambda f: jacfwd(jacrev(lambda a: f(a, *args[1:]).sin().sum()))(args[0]),  # noqa: B023
        ):
            torch.testing.assert_close(way(op), way(dense))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(a, d) for a, d in zip(args, directions)]
            ours, truth = (forward_ad.unpack_dual(f(*duals)) for f in (op, dense))
            torch.testing.assert_close(tuple(ours), tuple(truth))
        leaves = [a.clone().requires_grad_() for a in args]
        basis = torch.eye(dense(*args).numel(), dtype=torch.float64).view(-1, *dense(*args).shape)
        for ours, truth in zip(
            *(torch.autograd.grad(f(*leaves), leaves, basis, is_grads_batched=True) for f in (op, dense))
        ):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("packed", [False, True])
def test_masked_linear(packed):
    mask = random_mask(32, 64, 1, 0.4)
    x, w, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 64), (32, 64), (32,)))
    f = lambda x, w, b: masked_linear(x, w, pack_mask(mask) if packed else mask, b)  # noqa: E731
    dense = lambda x, w, b: F.linear(x, w * mask, b)  # noqa: E731
    every = (0, 1, 2)
    for way in (jacfwd, jacrev):
        torch.testing.assert_close(way(f, every)(x, w, b), way(dense, every)(x, w, b))
    masks = torch.stack([mask, ~mask])
    given = torch.stack([pack_mask(m) for m in masks]) if packed else masks
    y = vmap(lambda m: masked_linear(x, w, m, b))(given)
    torch.testing.assert_close(y, torch.stack([F.linear(x, w * m, b) for m in masks]))


@pytest.mark.clean_memory
@pytest.mark.parametrize("pattern", ["unstructured", "block16", "dense"])
def test_compiled_transforms(pattern):
    torch._dynamo.reset()
    sparse, dense, x, t = pair(pattern, torch.float32)
    for way in ("jvp", "vmap of grad"):
        ours = torch.compile(lambda x, t: WAYS[way](sparse, x, t), backend="aot_eager")(x, t)  # noqa: B023
        torch.testing.assert_close(ours, WAYS[way](dense, x, t))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_pytorch_puts_in_the_weights_place(pattern):
    """Pruning and parametrizations: removed weights count as 0 whatever they make of them."""
    from torch.nn.utils import parametrizations, parametrize, prune

    class Affine(nn.Module):
        def forward(self, weight):
            return 2 * weight + 1

    x = torch.randn(5, 64, dtype=torch.float64)
    for change, made, undo in (
        (lambda m: prune.l1_unstructured(m, "weight", 0.3), lambda m: m.weight_orig * m.weight_mask, lambda m: prune.remove(m, "weight")),
        (lambda m: parametrize.register_parametrization(m, "weight", Affine()), lambda m: 2 * m.parametrizations.weight.original + 1, lambda m: parametrize.remove_parametrizations(m, "weight")),
        (lambda m: parametrizations.spectral_norm(m.eval()), lambda m: m.parametrizations.weight[0](m.parametrizations.weight.original), lambda m: parametrize.remove_parametrizations(m, "weight")),
    ):  # fmt: skip
        sparse = pair(pattern)[0]
        change(sparse)
        for _ in range(2):
            (leaf,) = (p for name, p in sparse.named_parameters() if "weight" in name)
            truth = F.linear(x, made(sparse).masked_fill(~sparse.mask, 0), sparse.bias)
            torch.testing.assert_close(sparse(x), truth)
            ours, wanted = (torch.autograd.grad(y.sin().sum(), leaf)[0] for y in (sparse(x), truth))
            torch.testing.assert_close(ours, wanted)
            sparse.eval()
            with torch.no_grad():
                torch.testing.assert_close(sparse(x), truth)
                leaf.mul_(1.5)
        truth = sparse(x)
        undo(sparse)
        torch.testing.assert_close(sparse(x), truth)
        assert isinstance(sparse.weight, nn.Parameter) and not sparse.weight[~sparse.mask].any()
