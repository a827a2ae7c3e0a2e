"""Nothing that a process can set changes a value: the default dtype, the default device, a device context, the gradient
mode.

Buffers that kernels write through an address must have the type and place that the kernels assume, whatever torch.empty
would give by default.
"""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import pycse
from pycse import (
    fused_adapacse,
    fused_distill,
    fused_distillcse,
    fused_focal_infonce,
    fused_infonce,
    fused_sigmoid,
    fused_supcon,
)
from pycse.sparse import SparseLinear, masked_linear

ROOT = Path(pycse.__file__).parent
# What makes a tensor out of nothing, by the process's defaults where they are not named.
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided", "eye",
    "from_file", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unnamed(source: str) -> list[str]:
    """Calls of factories that leave dtype or device to the process, as "line: name"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        given = {keyword.arg for keyword in node.keywords}
        if isinstance(owner, ast.Name) and owner.id in ("torch", "pytorch") and node.func.attr in FACTORIES:
            if not {"dtype", "device"} <= given:
                found.append(f"{node.lineno}: torch.{node.func.attr}")
        elif node.func.attr in ("Tensor", "FloatTensor") and isinstance(owner, ast.Name) and owner.id == "torch":
            found.append(f"{node.lineno}: torch.{node.func.attr}")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_buffer_names_its_dtype_and_device(path):
    assert not unnamed(path.read_text(encoding="utf-8"))


def test_the_rule_sees_an_unnamed_buffer():
    assert unnamed(
        "torch.empty(3)\ntorch.zeros(3, dtype=torch.int32)\ntorch.ones(2, dtype=d, device=e)\ntorch.Tensor(2)"
    ) == [
        "1: torch.empty",
        "2: torch.zeros",
        "4: torch.Tensor",
    ]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta context": lambda: torch.device("meta"),
    "meta by default": lambda: default_device("meta"),
    "cuda by default": lambda: default_device("cuda"),  # without a GPU too: any buffer made there raises
}


def leaves(dtype, *shapes):
    g = torch.Generator("cpu").manual_seed(3)
    return [torch.randn(s, generator=g, dtype=torch.float64, device="cpu").to(dtype).requires_grad_() for s in shapes]


def contrastive(dtype, backend, B=8, N=8, tensors=False, **options):
    """Inputs, and a function of them, made before the state is entered."""
    z1, z2 = leaves(dtype, (B, 16), (N, 16))
    inputs = [z1, z2]
    tau, m = 0.05, 0.3
    if tensors:
        tau = torch.tensor(tau, dtype=torch.float32, device="cpu", requires_grad=True)
        m = torch.tensor(m, dtype=torch.float32, device="cpu", requires_grad=True)
        inputs += [tau, m]
    return inputs, lambda: fused_focal_infonce(z1, z2, tau, m, backend=backend, **options)


def sigmoid(dtype, backend, **options):
    z1, z2 = leaves(dtype, (8, 16), (8, 16))
    numbers = [torch.tensor(x, dtype=torch.float32, device="cpu", requires_grad=True) for x in (10.0, -10.0)]
    return [z1, z2, *numbers], lambda: fused_sigmoid(z1, z2, *numbers, backend=backend, **options)


def calls(dtype, backend):
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float32, device="cpu").requires_grad_()
    ids = torch.arange(8, dtype=torch.int64, device="cpu") // 2
    many = torch.arange(300, dtype=torch.int64, device="cpu") % 7
    tau = torch.tensor(0.07, dtype=torch.float32, device="cpu", requires_grad=True)
    z1, z2, e1, e2 = leaves(dtype, (8, 16), (8, 16), (8, 12), (8, 20))
    e1, e2 = e1.detach(), e2.detach()
    w, x, bias = leaves(dtype, (32, 64), (5, 64), (32,))
    blocks = torch.zeros(32, 64, dtype=torch.bool, device="cpu")
    blocks[:16, 16:48] = True
    single = (
        torch.rand(32, 64, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu") < 0.3
    )
    big1, big2 = leaves(dtype, (300, 64), (300, 64))  # beyond one native call
    alike = (big1 @ big1.t()).detach().double() / 256
    found = {
        "infonce": ([z1, z2], lambda: fused_infonce(z1, z2, backend=backend)),
        "focal": contrastive(dtype, backend),
        "parameters": contrastive(dtype, backend, tensors=True),
        "symmetric": contrastive(dtype, backend, symmetric=True),
        "hard negatives": contrastive(dtype, backend, N=16, hard_negative_weight=1.0),
        "excluded": contrastive(dtype, backend, query_ids=ids, key_ids=ids, exclude_above=0.1),
        "weighted rows": (
            [z1, z2, weight],
            lambda: fused_infonce(z1, z2, weight=weight, reduction="none", backend=backend),
        ),
        "panels": ([big1, big2], lambda: fused_infonce(big1, big2, backend=backend)),
        "panels, symmetric": ([big1, big2], lambda: fused_infonce(big1, big2, symmetric=True, backend=backend)),
        "adapacse": (
            [z1, z2, weight, tau],
            lambda: fused_adapacse(z1, z2, tau, guides=[(e1, e1), (e2, e2)], weight=weight, backend=backend),
        ),
        "adapacse, panels": (
            [big1, big2],
            lambda: fused_adapacse(big1, big2, 0.01, 0.7, guide_logits=alike, reduction="none", backend=backend),
        ),
        "sigmoid": sigmoid(dtype, backend),
        "sigmoid, ids": sigmoid(dtype, backend, query_ids=ids, key_ids=ids, weight=weight.detach(), reduction="none"),
        "sigmoid, panels": ([big1, big2], lambda: fused_sigmoid(big1, big2, backend=backend)),
        "distill": ([z1], lambda: fused_distill(z1, [e1, e2], seed=1, backend=backend)),
        "distill, expected": (
            [z1],
            lambda: fused_distill(z1, [e1], shuffle="expected", divergence="js", backend=backend),
        ),
        "distill, panels": ([big1], lambda: fused_distill(big1, [big2.detach()], seed=2, backend=backend)),
        "distillcse": ([z1, z2], lambda: fused_distillcse(z1, z2, [e1, e2], seed=1, backend=backend).loss),
        "supcon": ([z1], lambda: fused_supcon(z1, ids, backend=backend)),
        "supcon, keys": (
            [z1, z2, weight, tau],
            lambda: fused_supcon(z1, ids, z2, ids, tau, inside=True, weight=weight, backend=backend),
        ),
        "supcon, panels": ([big1], lambda: fused_supcon(big1, many, temperature=0.01, backend=backend)),
        "uniformity": ([z1], lambda: pycse.uniformity(z1, backend=backend)),
        "uniformity, sharp": ([z1], lambda: pycse.uniformity(z1, t=50.0, backend=backend)),
        "alignment": ([z1, z2], lambda: pycse.alignment(z1, z2, backend=backend)),
        "masked_linear": ([x, w, bias], lambda: masked_linear(x, w, single, bias, backend=backend)),
    }
    for name, mask in (("unstructured", single), ("block16", blocks), ("dense", single)):

        def layer(name=name, mask=mask):
            made = SparseLinear(64, 32, mask=mask, pattern=name, backend=backend, dtype=dtype, device="cpu")
            made.weight, made.bias = torch.nn.Parameter(w.detach().clone()), torch.nn.Parameter(bias.detach().clone())
            made(x).float().square().sum().backward()
            return torch.cat([made.weight.grad.flatten(), made.bias.grad, made(x).flatten()])

        def from_dense(name=name, mask=mask):
            linear = torch.nn.Linear(64, 32, device="cpu", dtype=dtype)
            linear.weight, linear.bias = (
                torch.nn.Parameter(w.detach().clone()),
                torch.nn.Parameter(bias.detach().clone()),
            )
            made = SparseLinear.from_dense(linear, mask, name, backend)
            return made.densify()(x) - made(x).detach() + made.eval()(x)

        found[f"SparseLinear {name}"] = ([x], layer)
        found[f"from_dense {name}"] = ([x], from_dense)
    return found


def outcome(inputs, run):
    for t in inputs:
        t.grad = None
    result = run()
    result.backward(torch.ones_like(result))
    return [result.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_state_of_the_process_changes_nothing(state, dtype, backend):
    if state.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("a buffer on the GPU would not raise here; the meta states show the same")
    for name, (inputs, run) in calls(dtype, backend).items():
        expected = outcome(inputs, run)
        with STATES[state]():
            actual = outcome(inputs, run)
        for e, a in zip(expected, actual):
            assert a.dtype == e.dtype and a.device == e.device, name
            assert torch.equal(a.nan_to_num(9), e.nan_to_num(9)), name
