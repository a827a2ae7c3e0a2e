"""SparseLinear, a Linear layer that computes only what its mask keeps, and masked_linear, its function."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pycse import transforms, validation
from pycse.backends import CHOICES
from pycse.kernels import native
from pycse.ops import sparse as ops
from pycse.sparse import pattern as patterns
from pycse.sparse.pattern import PATTERNS, SIDES, Pattern

BITS = "mask_bits"  # the mask packed, as it is saved
_DDP = nn.parallel.DistributedDataParallel
_PLAIN = (Tensor, nn.Parameter)
_is_exporting = getattr(torch.compiler, "is_exporting", None)  # torch >= 2.7


@transforms.recordable
def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""A linear layer under a mask, with no copy of W ⊙ M kept for backward.

    .. code-block:: text

        y = x (W ⊙ M)^T + b,    dX = dY (W ⊙ M),    dW = (dY^T X) ⊙ M

    The products are dense: any mask works and none is faster than F.linear. Use :class:`SparseLinear` to skip zeros.

    Args:
        x: (..., in); float32, float64, bfloat16 or float16.
        weight: (out, in), x's dtype. Values outside the mask count as 0 and get a gradient of exactly 0.
        mask: bool (out, in), True where a weight is kept; or the same packed, int32 (out, ceil(in / 32)) with bit j of
            word k for column 32 k + j (``pycse.sparse.pattern.pack_mask``).
        bias: (out,) or None.
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.

    Returns:
        (..., out) in x's dtype; under autocast as F.linear.

    Under torch.func's transforms, in forward-mode AD and in what is traced or exported it is F.linear of W ⊙ M, in
    PyTorch's own operators. Nothing of the mask is kept between calls: it may change. Packing it takes as long as
    reading W; pack it once to save that.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named, before any work.
        RuntimeError: the backend named cannot run here.
    """
    if any(isinstance(t, transforms.Proxy) for t in (x, weight, mask, bias)):
        raise transforms.Symbolic
    packed = isinstance(mask, Tensor) and mask.dtype == torch.int32
    if not ops.traced():  # whose sizes warn when they are compared
        validation.linear(x, weight, bias)
        (validation.packed_mask if packed else validation.linear_mask)("mask", mask, weight)
        validation.choice("backend", backend, CHOICES)
    if _composed():
        return _dense(x, weight, patterns.unpack_mask(mask, weight.shape[1]) if packed else mask, bias)
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        # Saved for backward, where gradients are asked for nevertheless.
        bits = mask if packed else patterns.pack_mask(mask)
        bits = bits.clone() if bits.is_inference() else bits
    y = ops.masked_linear(x.reshape(-1, x.shape[-1]), weight, bias, bits, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


class SparseLinear(nn.Linear):
    r"""nn.Linear under a mask: y = x (W ⊙ M)^T + b, computing only the kept weights where that is faster.

    ``weight`` is dense, of nn.Linear's name and shape. What lies outside ``mask`` (bool, a buffer) counts as 0, and is
    set to 0 when the mask changes, when the layer is saved, and before it is used densely after the weight changed.
    Reading ``layer.weight`` is such a use: modules that read a child's weight instead of calling it
    (nn.MultiheadAttention, the fast path of nn.TransformerEncoder) compute the same. Where the layer is called,
    gradients of removed weights are exactly 0 whatever the pattern, so optimizers leave the zeros alone. Products with
    removed weights are not computed: 0 · Inf and 0 · NaN give nothing there, where a dense layer gives NaN.

    state_dict holds weight, bias, and the mask packed: ``mask_bits``, int32 (out, ceil(in / 32)), bit j of word k for
    column 32 k + j. One without ``mask_bits``, as loaders that know no masks give it, is loaded under the layer's own
    mask. Both are buffers, and the one that changed counts. What kernels read is derived from the mask again when the
    mask, the device or the dtype changes (state_dict, ``to``, ``mask`` itself, also in place; what is written through
    ``mask.data``, or on a GPU by DistributedDataParallel, shows at the next ``train()`` or ``eval()``). A compiled
    layer keeps the mask that it was compiled with.

    In ``eval()`` without gradients single weights are packed for the CPU kernel once, not at every call: density · out
    · in numbers more, made again when the weight changes. A write through ``weight.data`` is seen where it changes one
    of some 500 numbers spread over the weight, else (and on a GPU) at the next ``train()`` or ``eval()``.

    Kernels take plain tensors, eagerly and under torch.compile. Everywhere else the layer is F.linear of W ⊙ M in
    PyTorch's own operators: under torch.func's transforms (grad, jvp, vmap, …), in forward-mode AD, for subclasses of
    Tensor (FakeTensor), in torch.jit.trace, torch.export and torch.onnx.export. torch.fx keeps it as a call of
    a module.

    Args:
        mask: bool (out, in), True where a weight is kept; default: every weight.
        pattern: "auto" (the fastest, or "dense" where sparse does not pay: ``repr`` says why), "unstructured",
            "block16", "block32", "block64" (masks made of whole square blocks), "2:4" (NVIDIA GPUs) or "dense".
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.
        in_features, out_features, bias, device, dtype: as nn.Linear; float32, float64, bfloat16 or float16.

    Forward takes x (..., in) of the weight's dtype (any under autocast) and gives (..., out).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or a mask that the pattern named cannot hold.
        RuntimeError, in forward: the backend named cannot run here.
    """

    mask: Tensor
    mask_bits: Tensor
    _derived: _Derived | None = None
    _zeroed: tuple[Tensor, Any] | None = None  # the weight that is 0 outside the mask, and what tells that it changed
    _made: tuple[Tensor, Any, Any] | None = None  # the weight, what tells that it changed, what a kernel reads for it
    _swapped = False  # others put their tensors in the weight's place (FSDP): never write to them

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: Tensor | None = None,
        pattern: str = "auto",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        validation.choice("pattern", pattern, PATTERNS)
        validation.choice("backend", backend, CHOICES)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.pattern, self.backend = pattern, backend
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        validation.linear_mask("mask", mask, self.weight)
        with torch.inference_mode(False):
            self.register_buffer("mask", mask.detach().clone(), persistent=False)
            self.register_buffer(BITS, patterns.pack_mask(self.mask))
        self._derive()

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor, pattern: str = "auto", backend: str = "auto") -> SparseLinear:
        """A sparse copy of ``linear``, which stays as it is.

        Args:
            linear: the nn.Linear to copy: weights, bias, dtype, device, training mode and requires_grad; no hooks.
            mask, pattern, backend: as :class:`SparseLinear`.

        Raises:
            TypeError, ValueError: as :class:`SparseLinear`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        validation.linear_mask("mask", mask, weight)
        result = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            pattern=pattern,
            backend=backend,
            device="meta",
        )
        with torch.inference_mode(False):  # whatever the caller is in, the copy can be trained
            result.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            if linear.bias is not None:
                result.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
            result.mask = mask.detach().clone()
            result.mask_bits = patterns.pack_mask(result.mask)
        result.train(linear.training)._derive()
        return result

    def densify(self) -> nn.Linear:
        """A plain nn.Linear with the same values: zeros outside the mask, and nothing that keeps them."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self._given("weight")
        linear.weight = nn.Parameter(weight.detach().masked_fill(~self._mask_now(), 0), weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._given("weight")
        if torch.compiler.is_compiling():
            derived = self._derived
            if _composed() or derived is None or not derived.operands:
                return self._composed(input, weight)
        elif type(input) not in _PLAIN or type(weight) not in _PLAIN or _composed():
            return self._recorded(input) if isinstance(input, transforms.Proxy) else self._composed(input, weight)
        else:
            derived = self._current()
        bias = self._given("bias")
        validation.linear(input, weight, bias)
        if derived.operands:
            x = input if input.dim() == 2 else input.reshape(-1, self.in_features)
            index = (*derived.operands, self.backend)
            y = ops.sparse_linear(x, weight, bias, *index, pattern=self._fixed(weight, derived, index))
            return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)
        if not self._zero(weight):
            weight = weight.masked_fill(~derived.mask, 0)
        elif torch.is_grad_enabled() and weight.requires_grad:
            weight = _KeptGradient.apply(weight, derived.mask)
        elif derived.chosen == "2:4":
            weight = self._semi_structured(weight)
        return F.linear(input, weight, bias)

    def _composed(self, input: Tensor, weight: Tensor) -> Tensor:
        """F.linear of W ⊙ M in PyTorch's own operators, for whatever looks through them."""
        mask, bias = self._mask_now(), self._given("bias")
        if not ops.traced():  # whose sizes warn when they are compared
            validation.linear(input, weight, bias)
            validation.linear_mask("mask", mask, weight)
        return _dense(input, weight, mask, bias)

    def _recorded(self, input: Any) -> Any:
        """What torch.fx keeps of a call: the module, or, where it is traced itself, its products."""
        if self is input.tracer.root:
            weight: Any = super().__getattr__("weight")
            return _dense(input, weight, self._mask_now(), self.bias)
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})

    @property
    def chosen(self) -> str:
        """The pattern in use."""
        return "dense" if self._derived is None else self._derived.chosen

    @property
    def reason(self) -> str:
        """Why that one."""
        return "" if self._derived is None else self._derived.reason

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.mask.count_nonzero().item() / self.mask.numel() if self.mask.numel() else 1.0

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, pattern={self.chosen}"
        if not self.mask.is_meta:
            text += f", density={self.density:.1%}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        if self.chosen == "dense" and self.reason:
            text += f" (dense: {self.reason})"
        return text

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return self._read(value) if name == "weight" and type(value) in _PLAIN else value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._zeroed = self._made = None
            self._swapped |= isinstance(value, Tensor) and type(value) not in _PLAIN

    def _given(self, name: str) -> Any:
        """A parameter as it stands, with or without zeros; or what a parametrization or pruning makes of it."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _read(self, weight: Tensor) -> Tensor:
        """The weight for who asks for it: itself with zeros outside the mask, W ⊙ M where that cannot be."""
        mask = self._buffers.get("mask")
        if mask is None or weight.is_meta:  # in nn.Linear's own __init__
            return weight
        if not torch.compiler.is_compiling() and weight.dim() != 2:  # a piece of it, as FSDP keeps them
            self._swapped = True
            return weight
        if torch.compiler.is_compiling() or _composed():
            return weight.masked_fill(~self._mask_now(), 0)
        mask = self._current().mask
        return weight if self._zero(weight) else weight.masked_fill(~mask, 0)

    def _mask_now(self) -> Tensor:
        """The mask, brought up to date where that is no part of what is traced."""
        mask = self.mask
        if torch.compiler.is_compiling() or type(mask) is not Tensor or _wrapped(mask):
            return mask
        state: Any = torch._C._get_tracing_state()
        if state is None:
            return self._current().mask
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return self._current().mask
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    def _current(self) -> _Derived:
        """What follows from the mask as it is now. One object, exchanged whole: other threads may be in forward."""
        known = self._derived
        # DistributedDataParallel writes to buffers before each forward, and hides that from their versions.
        if known is not None and (_DDP._active_ddp_module is None or known.like[1].type != "cpu"):
            mask, bits, weight = self._buffers["mask"], self._buffers[BITS], self._given("weight")
            if (
                mask is known.mask
                and bits is known.bits
                and known.versions == (mask._version, bits._version)  # type: ignore[union-attr]
                and known.like == (weight.dtype, weight.device, weight.shape)
            ):
                return known
        return self._derive()

    def _derive(self) -> _Derived:
        """Pattern and index from the mask; the weight is set to 0 outside it."""
        weight, known = self._given("weight"), self._derived
        like = (weight.dtype, weight.device, weight.shape)
        validation.linear_mask("mask", self.mask, weight, anywhere=True)
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            mask, bits = self._agree()
            validation.linear_mask("mask", mask, weight)
            derived = _Derived(mask, bits, (mask._version, bits._version), like)
            if mask.is_meta or weight.is_meta or type(mask) is not Tensor:  # until values are loaded
                self._made = self._zeroed = None
                self._derived = derived
                return derived
            if (
                known is not None
                and known.like == like
                and known.packed is not None
                and torch.equal(known.packed, bits)
            ):
                derived = replace(known, mask=mask, bits=bits, versions=derived.versions)  # DDP writes what was there
            else:
                chosen, reason = _chosen(self.pattern, mask, weight)
                operands: tuple[Any, ...] = ()
                if chosen in SIDES:
                    operands = (*Pattern.from_mask(mask, SIDES[chosen]).tensors, SIDES[chosen])
                derived = replace(derived, packed=bits.clone(), chosen=chosen, reason=reason, operands=operands)
                self._made = self._zeroed = None
            self._derived = derived
            self._zero(weight)
        return derived

    def _agree(self) -> tuple[Tensor, Tensor]:
        """The mask and its bits, made equal: the one that changed since they last were counts, the mask if both did."""
        mask, bits, known = self.mask, self.mask_bits, self._derived
        if mask.is_meta and not bits.is_meta:  # values came one by one
            mask = patterns.unpack_mask(bits, self.in_features)
        if mask.is_meta or type(mask) is not Tensor:
            return mask, bits
        packed = patterns.pack_mask(mask)
        if known is not None and known.packed is not None and not bits.is_meta:
            validation.packed_mask(BITS, bits, mask, anywhere=True)
            bits = bits.to(packed.device)
            if not torch.equal(bits, packed) and torch.equal(known.packed.to(packed.device), packed):
                mask, packed = patterns.unpack_mask(bits, self.in_features), bits
        self.mask = _written(self.mask, mask)
        self.mask_bits = _written(self.mask_bits, packed)
        return self.mask, self.mask_bits

    def _zero(self, weight: Tensor) -> bool:
        """Set the weight to 0 outside the mask where it changed; False for a weight that is not ours to write to.

        Optimizers write there: what was removed after they took steps still has momentum. Merged adapters do as well.
        """
        known = self._zeroed
        if type(weight) is not nn.Parameter or self._swapped or weight.is_meta or weight._is_zerotensor():
            return False
        mark = _mark(weight)
        if known is not None and known[0] is weight and known[1] == mark:
            return True
        if weight.is_inference() and not torch.is_inference_mode_enabled():
            return False
        with torch.no_grad():
            if known is not None and known[0] is weight:
                # No forward since then used what lies outside the mask: its backward need not hear of this write.
                weight.data.masked_fill_(~self.mask, 0)
            elif weight.masked_fill(self.mask, 0).any():  # a write breaks the backward of an earlier forward
                weight.masked_fill_(~self.mask, 0)
        self._zeroed = weight, _mark(weight)
        return True

    def _semi_structured(self, weight: Tensor) -> Tensor:
        """PyTorch's compressed 2:4 weight; made again when the weight changes (not for writes to ``weight.data``)."""
        made, mark = self._made, _mark(weight)
        if made is None or made[0] is not weight or made[1] != mark:
            self._made = made = weight, mark, torch.sparse.to_sparse_semi_structured(weight.detach())
        return made[2]

    def _fixed(self, weight: Tensor, derived: _Derived, index: tuple[Any, ...]) -> Pattern | None:
        """The pattern with the single weights as the CPU kernel reads them, while nothing trains."""
        if (
            self.training
            or derived.chosen != "unstructured"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return None
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
            return None
        if weight.is_neg() or weight._is_zerotensor():
            return None
        made, mark = self._made, _mark(weight)
        if made is None or made[0] is not weight or made[1] != mark or made[2].ptr is not derived.operands[0]:
            self._made = made = weight, mark, ops.packed(weight, *index)
        return made[2]

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        mask = self.mask
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            if self.mask is not mask:  # whatever it became: type() casts it, to_empty() empties it
                device = self.mask.device
                known = not mask.is_meta or self.mask.is_meta
                self.mask = mask.to(device) if known else torch.ones(mask.shape, dtype=torch.bool, device=device)
            self.mask_bits = patterns.pack_mask(self.mask)
        self._derived = None
        with contextlib.suppress(ValueError):  # a pattern that does not run there: forward says so, if asked
            self._derive()
        return self

    def train(self, mode: bool = True) -> SparseLinear:
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        """Not all writes show (those through ``data`` do not), so weight and mask are to be looked at again."""
        self._made = None
        if self._derived is not None:
            self._derived = replace(self._derived, versions=(-1, -1))
        if self._zeroed is not None:
            self._zeroed = self._zeroed[0], None

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name, weight = prefix + BITS, self._given("weight")
        bits, mask, assign = state_dict.get(name), None, local_metadata.get("assign_to_params_buffers")
        if bits is not None:
            try:
                validation.packed_mask(name, bits, weight, anywhere=True)
                mask = patterns.unpack_mask(bits, self.in_features)
                _chosen(self.pattern, mask, weight)
            except (TypeError, ValueError) as error:  # before anything is changed
                error_msgs.append(str(error))
                return
        elif assign and self.mask.is_meta:
            error_msgs.append(f"{name} must be in the state_dict of a layer whose mask has no values (device meta)")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        if bits is None and name in missing_keys:
            missing_keys.remove(name)
        if mask is not None:
            with torch.inference_mode(False), torch.no_grad():
                if assign:
                    self.mask = mask.clone()
                elif not self.mask.is_meta:
                    self.mask.copy_(mask)
        self._derive()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        weight = self._given("weight")
        if weight.dim() == 2:  # else a piece of it, as FSDP keeps them
            self._forget()
            self._current()
            if not self._zero(weight) and hasattr(weight, "device_mesh"):
                _zero_shards(weight, self.mask)
        else:
            self._agree()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        self._current()
        return {**self.__dict__, "_derived": None, "_zeroed": None, "_made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if BITS not in self._buffers:  # of a version that kept the kernels' lists as buffers
            for name in ("ptr", "cols", "t_ptr", "t_rows", "plan", "t_plan"):
                self._buffers.pop(name, None)
            for name in ("chosen", "reason", "_source"):
                self.__dict__.pop(name, None)
            self.register_buffer(BITS, patterns.pack_mask(self.mask))
        self._derive()


@dataclass(frozen=True)
class _Derived:
    """What follows from a mask, and how the buffers were that it followed from."""

    mask: Tensor
    bits: Tensor
    versions: tuple[int, int]
    like: tuple[torch.dtype, torch.device, torch.Size]  # of the weight
    packed: Tensor | None = None  # a copy of the bits; None while they have no values
    chosen: str = "dense"
    reason: str = ""
    operands: tuple[Any, ...] = ()  # of the operator: the pattern's lists and the side of its blocks; empty if dense


class _KeptGradient(torch.autograd.Function):
    """The weight itself, with a gradient of exactly 0 outside the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.masked_fill(~mask, 0), None


def _chosen(pattern: str, mask: Tensor, weight: Tensor) -> patterns.Choice:
    """Raises ValueError where the mask does not fit the pattern named."""
    if mask.is_meta:
        return patterns.Choice("dense", "")
    if pattern == "auto":
        return patterns.choose(mask, weight.dtype, weight.device)
    if pattern in SIDES:
        patterns.whole_blocks(mask, SIDES[pattern])
    if pattern == "2:4" and (problem := patterns.semi_structured_problem(mask, weight.dtype, weight.device)):
        raise ValueError(f"pattern '2:4' cannot be used: {problem}")
    return patterns.Choice(pattern, "as asked")


def _composed() -> bool:
    """Whether products are to be written in PyTorch's own operators, for who looks through them."""
    if torch.compiler.is_compiling():
        # An exported program is to run without pycse, and to be turned into ONNX.
        return not torch.compiler.is_dynamo_compiling() if _is_exporting is None else _is_exporting()
    return ops.transformed() or ops.traced()


def _written(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer with another value, in place where it can be (not inference tensors: they count no changes)."""
    if buffer is value and not buffer.is_inference():
        return buffer
    if buffer.is_inference() or (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device):
        return value.clone()
    return buffer if torch.equal(buffer, value) else buffer.copy_(value)


def _dense(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.masked_fill(~mask, 0), bias)


def _wrapped(t: Tensor) -> bool:
    return transforms.active() and torch._C._functorch.is_functorch_wrapped_tensor(t)


def _mark(weight: Tensor) -> tuple[Any, ...]:
    """What differs after a write to a weight, but for a write to some single numbers of ``weight.data``."""
    version = 0 if weight.is_inference() else weight._version
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return weight.data_ptr(), version
    address = weight.data_ptr()
    return address, version, native().fingerprint(address, weight.nbytes)


def _zero_shards(weight: Tensor, mask: Tensor) -> None:
    """The same for a weight that is spread over processes (DTensor), without communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    with torch.no_grad():
        weight.masked_fill_(DTensor.from_local(~mask, mesh, [Replicate()] * mesh.ndim, run_check=False), 0)
