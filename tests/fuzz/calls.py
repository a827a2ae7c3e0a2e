"""One call of a problem, and its judgement."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor

from fuzz import layouts
from fuzz.problems import DTYPES, Problem, make
from pycse.backends.cpu import contrastive as cpu_contrastive
from pycse.backends.cpu import distill as cpu_distill
from pycse.panels import contrastive as contrastive_panels
from pycse.panels import distill as distill_panels
from pycse.panels import parts as parts_panels
from pycse.panels import sides
from pycse.panels import uniformity as uniformity_panels

from oracle import BAND, FLOOR_GRADIENT, FLOOR_LOSS

BACKENDS = ("cpu", "cpu", "auto", "torch")
SEVERAL = 6  # calls of a problem
ZERO = torch.zeros((), dtype=torch.float64)


class Fault(AssertionError):
    """A call that did what it must not."""


def describe(c: Any, d: dict[str, Any]) -> dict[str, Any]:
    """A call of the problem that ``d`` describes."""
    call: dict[str, Any] = dict(backend=c.pick(BACKENDS))
    call["layouts"] = {
        name: c.pick(layouts.MATRICES)
        for name in ("z1", "z2", "z", "x", "y", "weight matrix", "logits")
        if c.chance(0.5)
    }
    call["layouts"] |= {
        name: c.pick(layouts.VECTORS) for name in ("weight", "bias", "upstream", "bounds") if c.chance(0.3)
    }
    call["layouts"] |= {name: c.pick(layouts.INTEGERS) for name in ("ids", "positives", "mask") if c.chance(0.3)}
    if c.chance(0.5):
        call["states"] = [c.pick(tuple(layouts.STATES)) for _ in range(c.whole(1, 2))]
    call["alias"] = c.pick(("no", "no", "same", "view"))
    call["frozen"] = [
        n for n in ("z1", "z2", "z", "x", "y", "weight", "bias", "scale", "temperature", "m") if c.chance(0.2)
    ]
    call["module"] = c.chance(0.3)
    call["panels"] = c.pick((None, None, None, 1, 3, 13))
    call["factor"] = c.pick((1.0, 1.0, -2.5, 1e-3))
    call["backward"] = c.pick(("once", "once", "once", "twice", "double", "none"))
    return call


@contextlib.contextmanager
def _panels(rows: int | None) -> Any:
    """Small problems by the panels that large ones take, ``rows`` at a time."""
    if rows is None:
        yield
        return
    modules = (contrastive_panels, parts_panels, distill_panels, uniformity_panels)
    before = [m.panel_rows for m in modules], cpu_contrastive.SMALL, cpu_distill.SMALL, sides.PAIR_BYTES
    try:
        contrastive_panels.panel_rows = parts_panels.panel_rows = lambda B, *_: min(B, rows)
        sides.PAIR_BYTES = 1 << 10
        distill_panels.panel_rows = lambda d, *_: min(d.z1.shape[0], rows)
        uniformity_panels.panel_rows = lambda p, *_: min(p.z.shape[0], rows)
        cpu_contrastive.SMALL = cpu_distill.SMALL = {}
        yield
    finally:
        for m, f in zip(modules, before[0]):
            m.panel_rows = f
        cpu_contrastive.SMALL, cpu_distill.SMALL, sides.PAIR_BYTES = before[1:]


class Arguments:
    """The problem's tensors as a call gets them, and what must not change."""

    def __init__(self, p: Problem, call: dict[str, Any], autocast: bool) -> None:
        self.p, self.call, self.autocast = p, call, autocast
        self.memory: list[tuple[str, Tensor, Tensor]] = []
        self.inputs = {name: self._input(name, value) for name, value in p.inputs.items()}
        self.others = {name: self._other(name, value) for name, value in p.others.items()}
        if call["alias"] != "no":
            self._alias(call["alias"])

    def _input(self, name: str, value: Tensor) -> Tensor:
        if self.autocast and name in self.p.embeddings:
            value = value.float()
        kind = self.call["layouts"].get("weight matrix" if name == "weight" and value.dim() == 2 else name, "plain")
        grad = self._trained(name)
        return self._lay(name, value, kind, lambda t: t.requires_grad_(grad))

    def _trained(self, name: str) -> bool:
        return name not in self.call["frozen"]

    def _lay(self, name: str, value: Tensor, kind: str, leaf: Any = lambda t: t) -> Tensor:
        if self.p.op == "SparseLinear" and name in ("weight", "bias"):  # a layer's own
            return torch.nn.Parameter(value.clone(), self._trained(name))
        result, base = layouts.lay(value, kind, leaf)
        if not base._is_zerotensor():
            self.memory.append((name, base.detach(), base.detach().clone()))
        return result

    def _other(self, name: str, value: Any) -> Any:
        chosen = self.call["layouts"]
        if name == "teachers":
            value = [e.float() if self.autocast else e for e in value]
            return [self._lay(f"teachers[{k}]", e, chosen.get("logits", "plain")) for k, e in enumerate(value)]
        if name == "guides":
            return [
                tuple(
                    self._lay(f"guides[{k}][{side}]", e, chosen.get("logits", "plain")) for side, e in enumerate(pair)
                )
                for k, pair in enumerate(value)
            ]
        if name == "negatives":
            return tuple(self._lay(f"negatives[{k}]", t, chosen.get("ids", "plain")) for k, t in enumerate(value))
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if name == "mask":
            kind = {"every other": "every other column", "expanded": "transposed"}.get(chosen.get("mask"), "plain")
        else:
            layout = {"teacher_logits": "logits", "guide_logits": "logits", "exclude_above": "bounds"}.get(name, name)
            kind = chosen.get("ids" if "ids" in name else layout, "plain")
        return self._lay(name, value, kind)

    def _alias(self, how: str) -> None:
        """Arguments that share memory, where the values allow it."""
        for one, two in (("z1", "z2"), ("x", "y")):
            if one in self.inputs and two in self.inputs and how == "same":
                a, b = self.p.inputs[one], self.p.inputs[two]
                if a.shape == b.shape and torch.equal(a, b) and self._trained(one) == self._trained(two):
                    self.inputs[two] = self.inputs[one]
        if self.p.d["kind"] == "shared" and how == "view" and "z2" in self.inputs:
            self._share()
        if self.p.d.get("own") and how == "view":
            z = self.inputs["z" if self.p.op == "distill" else "z1"]
            self.others["teachers"][-1] = z.detach()

    def _share(self) -> None:
        """Keys that are the queries' memory from some row on."""
        z1, z2, k = self.p.inputs["z1"], self.p.inputs["z2"], self.p.d["seed"] % (self.p.d["B"] + 1)
        if k + len(z2) < len(z1):
            return
        base = torch.cat([z1[:k], z2])
        base = base.float() if self.autocast else base
        base.requires_grad_(self._trained("z1") and self._trained("z2"))
        self.memory.append(("z1 and z2", base.detach(), base.detach().clone()))
        self.inputs["z1"], self.inputs["z2"] = base[: len(z1)], base[k : k + len(z2)]

    def check_untouched(self) -> None:
        for name, now, before in self.memory:
            same = torch.equal(now, before)
            if not same and now.is_floating_point():  # NaN equals itself here
                same = torch.equal(now.isnan(), before.isnan()) and torch.equal(now.nan_to_num(), before.nan_to_num())
            if not same:
                raise Fault(f"{name} was written to")


def run(p: Problem, call: dict[str, Any]) -> None:
    """Make the call; Fault where it is wrong."""
    chosen = [s for s in call.get("states", ()) if _fits(s, p, call)]
    autocast = "autocast" in chosen
    given = Arguments(p, call, autocast)
    factor = 1.0 if p.dtype == torch.float16 else call["factor"]  # whose gradients would be 0 already
    upstream = (p.upstream * factor).to(_result_dtype(p))
    if upstream.dim() == 1 and upstream.numel():
        upstream, _ = layouts.lay(upstream, call["layouts"].get("upstream", "plain"), lambda t: t)
    wanted = {n: t for n, t in given.inputs.items() if t.requires_grad}
    graded = bool(wanted) and not {"no grad", "inference mode"} & set(chosen) and call["backward"] != "none"
    gradients: list[Any] = []
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(_panels(call["panels"]))
        for state in chosen:
            stack.enter_context(
                torch.autocast("cpu", p.dtype) if state == "autocast" else layouts.STATES[state]()
            )  # fmt: skip
        value = p.call(given.inputs, given.others, call["backend"], call["module"])
        if value.dtype != upstream.dtype or tuple(value.shape) != p.truth_shape:
            raise Fault(f"result is {value.dtype} {tuple(value.shape)}, must be {upstream.dtype} {p.truth_shape}")
        if graded and not value.requires_grad:
            raise Fault("the result does not require grad, and its inputs do")
        if graded:
            again = call["backward"] in ("twice", "double")
            double = call["backward"] == "double"
            leaves = list({id(t): t for t in wanted.values()}.values())
            grad = lambda **how: torch.autograd.grad(value, leaves, upstream, allow_unused=True, **how)  # noqa: E731
            if double:
                _second_derivative(p, grad)
            gradients.append(grad(retain_graph=again))
            if again:
                gradients.append(grad())
    given.check_untouched()
    _judge(p, "value", plain(value), p.truth["value"], 1.0)
    for made in gradients:
        found = dict(zip(map(id, leaves), made))
        for name, leaf in wanted.items():
            g = found[id(leaf)]
            truth = p.truth[name]
            if sum(t is leaf for t in wanted.values()) > 1:
                truth = sum(p.truth[n] for n, t in wanted.items() if t is leaf)
            if g is None:
                if truth.any():
                    raise Fault(f"no gradient of {name}")
                continue
            if g.dtype != leaf.dtype or g.shape != leaf.shape:
                raise Fault(
                    f"gradient of {name} is {g.dtype} {tuple(g.shape)}, its input {leaf.dtype} {tuple(leaf.shape)}"
                )
            shared = isinstance(truth, Tensor) and truth is not p.truth[name]
            _judge(p, name, plain(g), truth, factor, shared)


def _second_derivative(p: Problem, grad: Any) -> None:
    """Of a layer it exists; of a loss it must be refused, and never be 0."""
    made = [g for g in grad(create_graph=True) if g is not None and g.requires_grad]
    if p.mask is not None or not made:
        return
    try:
        sum(g.double().sum() for g in made).backward()
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise
    else:
        raise Fault("a second derivative was taken without an error")


def _fits(state: str, p: Problem, call: dict[str, Any]) -> bool:
    if state == "autocast":
        return p.dtype in (torch.bfloat16, torch.float16) and p.op != "SparseLinear" and len(p.types) == 1
    if state == "anomaly mode":  # raises for what is not finite, and never saves what it could not
        return p.finite
    return True


def _result_dtype(p: Problem) -> torch.dtype:
    if p.mask is not None:
        return p.dtype
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def plain(t: Tensor) -> Tensor:
    return t.detach().as_subclass(Tensor).double().resolve_neg()


def _judge(p: Problem, name: str, actual: Tensor, truth: Tensor, factor: float, shared: bool = False) -> None:
    if not p.finite:
        return _judge_not_finite(p, name, actual, truth)
    if p.op == "logsum" and name == "value" and p.settled:  # of a row without a key
        nothing = truth.isneginf()
        if not torch.equal(actual.isneginf(), nothing):
            raise Fault("value: other rows are without a key")
        actual, truth = actual.masked_fill(nothing, 0), truth.masked_fill(nothing, 0)
    if not actual.isfinite().all():
        if p.op == "logsum" and name == "value" and not p.settled and not (actual.isnan() | actual.isposinf()).any():
            return None
        largest = torch.finfo(p.inputs[name].dtype).max if name in p.inputs else torch.inf
        if truth.abs().max() * abs(factor) > 0.9 * largest:
            return None
        raise Fault(f"{name} is not finite")
    if not p.settled or p.rounding >= 0.5:  # one rounding of a similarity is a factor in the loss
        return None
    band = max(BAND[t] for t in p.types)
    if name in p.inputs and name not in p.embeddings:  # a gradient is stored in its input's type
        band = max(band, torch.finfo(p.inputs[name].dtype).eps)
    error = _error(p, name, actual / factor, truth)
    if error <= band:
        return None
    if shared:  # the same tensor twice: its gradients cancel, or do not
        error /= 2
    errors = [_error(p, name, other[name], p.truth[name]) for other in (p.eager, *p.shaken)]
    # Eager may be NaN where the truth is not.
    budget = 2 * max((e for e in errors if e < torch.inf), default=0.0) + band + p.rounding
    if not error <= budget:
        raise Fault(f"{name}: error {error:.2e}, budget {budget:.2e}")


def _error(p: Problem, name: str, actual: Tensor, truth: Tensor) -> float:
    off = actual - truth
    if name in p.norms:
        off, truth = off * p.norms[name], truth * p.norms[name]
    size = truth.norm()
    if p.mask is not None:
        floor = p.sizes[name].item() / max(1, truth.numel()) ** 0.5
    elif p.op in ("uniformity", "alignment"):  # sums of terms up to t, whose logarithm may be 0
        floor = max(1.0, p.d.get("t", 1.0) * p.range)
    elif name == "value":  # a divergence is a difference of entropies, and a part may be subtracted
        cancels = p.op == "logsum" or p.d.get("divergence") in ("kl", "js") or p.d.get("factor", 1.0) < 0
        floor = 0.1 * p.total if cancels else FLOOR_LOSS
    else:
        floor = max(FLOOR_GRADIENT * max(1, p.parallel * p.steepest / 46) * p.total, p.sizes.get(name, ZERO).item())
    size = size.clamp_min(floor * max(1, truth.numel()) ** 0.5)
    return (off.norm() / size.clamp_min(1e-300)).item()


def _judge_not_finite(p: Problem, name: str, actual: Tensor, truth: Tensor) -> None:
    """NaN and infinity come out where eager PyTorch has them. Gradients of such a loss mean nothing."""
    if name != "value":
        return
    if p.op in ("distill", "distillcse") and p.d["B"] == 1:  # no pair: 0, whatever it holds
        return
    # A row without negatives has loss 0, whatever it holds.
    chooses = ("exclude_above", "guides", "guide_logits", "negatives", "query_ids", "ids1")
    if p.d.get("N") == 1 or not p.d.get("include", True) or any(n in {**p.options, **p.others} for n in chooses):
        return
    if p.mask is None:
        wrong = actual.isfinite() != truth.isfinite()
    else:  # products with removed weights are not computed: what eager has there is another matter
        x = p.inputs["x"].double()
        touched = (~x.isfinite()).double().reshape(-1, x.shape[-1]) @ p.mask.t().double() > 0
        dirty = (~x.isfinite()).reshape(-1, x.shape[-1]).any(1, keepdim=True)
        wrong = (actual.isfinite().reshape(touched.shape) == touched) & (touched | ~dirty)
    if wrong.any():
        raise Fault(f"{name} is finite where eager's is not, or the other way round")


def case(c: Any, op: str | None = None) -> dict[str, Any]:
    """A problem and calls of it, described."""
    from fuzz import problems

    d = problems.describe(c, op)
    return {"problem": d, "calls": [describe(c, d) for _ in range(SEVERAL)]}


def run_case(description: dict[str, Any], before: Any = lambda k: None) -> int:
    """Run what ``case`` described; how many calls that were. ``before`` is told which call comes."""
    p = make(description["problem"])
    for k, call in enumerate(description["calls"]):
        before(k)
        try:
            run(p, call)
        except Fault as fault:
            raise Fault(f"call {k}: {fault}") from None
    return len(description["calls"])


__all__ = ["DTYPES", "Fault", "case", "describe", "run", "run_case"]
