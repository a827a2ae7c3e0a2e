"""SparseLinear, a Linear layer that computes only what its mask keeps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pycse import transforms, validation
from pycse.choices import BACKEND_CHOICES
from pycse.ops import sparse as ops
from pycse.pattern import Pattern, pack_mask, unpack_mask
from pycse.sparse import weight as weights
from pycse.sparse.choice import PATTERNS, resolve
from pycse.sparse.derived import BITS, Derived, agreed, derive, written
from pycse.sparse.masked import composed, dense, masked_linear  # noqa: F401 (graphs pickled before it moved look here)
from pycse.sparse.weight import Seen

_DDP = nn.parallel.DistributedDataParallel
_PLAIN = (Tensor, nn.Parameter)


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
    _derived: Derived | None = None
    _zeroed: Seen | None = None  # the weight that is 0 outside the mask
    _made: Seen | None = None  # the weight, and what a kernel reads in its place
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
        validation.choice("backend", backend, BACKEND_CHOICES)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.pattern, self.backend = pattern, backend
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        validation.linear_mask("mask", mask, self.weight)
        with torch.inference_mode(False):
            self.register_buffer("mask", mask.detach().clone(), persistent=False)
            self.register_buffer(BITS, pack_mask(self.mask))
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
            result.mask_bits = pack_mask(result.mask)
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
            if composed() or derived is None or not derived.operands:
                return self._composed(input, weight)
        elif type(input) not in _PLAIN or type(weight) not in _PLAIN or composed():
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
        if not self._zero(weight, derived.mask):
            weight = weight.masked_fill(~derived.mask, 0)
        elif torch.is_grad_enabled() and weight.requires_grad:
            weight = weights.KeptGradient.apply(weight, derived.mask)
        elif derived.chosen == "2:4":
            weight = self._keep(weights.semi_structured(weight, self._made))
        return F.linear(input, weight, bias)

    def _composed(self, input: Tensor, weight: Tensor) -> Tensor:
        """F.linear of W ⊙ M in PyTorch's own operators, for whatever looks through them."""
        mask, bias = self._mask_now(), self._given("bias")
        if not ops.traced():  # whose sizes warn when they are compared
            validation.linear(input, weight, bias)
            validation.linear_mask("mask", mask, weight)
        return dense(input, weight, mask, bias)

    def _recorded(self, input: Any) -> Any:
        """What torch.fx keeps of a call: the module, or, where it is traced itself, its products."""
        if self is input.tracer.root:
            weight: Any = super().__getattr__("weight")
            return dense(input, weight, self._mask_now(), self.bias)
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
        if torch.compiler.is_compiling() or composed():
            return weight.masked_fill(~self._mask_now(), 0)
        mask = self._current().mask
        return weight if self._zero(weight, mask) else weight.masked_fill(~mask, 0)

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

    def _current(self) -> Derived:
        """What follows from the mask as it is now. One object, exchanged whole: other threads may be in forward."""
        known = self._derived
        # DistributedDataParallel writes to buffers before each forward, and hides that from their versions.
        if known is not None and (_DDP._active_ddp_module is None or known.like[1].type != "cpu"):
            mask, bits, weight = self._buffers["mask"], self._buffers[BITS], self._given("weight")
            if known.holds(mask, bits, weight):
                return known
        return self._derive()

    def _derive(self) -> Derived:
        """Pattern and index from the mask; the weight is set to 0 outside it."""
        weight, known = self._given("weight"), self._derived
        validation.linear_mask("mask", self.mask, weight, anywhere=True)
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            mask, bits = self._agree()
            validation.linear_mask("mask", mask, weight)
            derived = derive(self.pattern, mask, bits, weight, known)
            if known is None or derived.packed is None or derived.packed is not known.packed:
                self._made = self._zeroed = None
            self._derived = derived
            if derived.packed is not None:
                self._zero(weight, derived.mask)
        return derived

    def _agree(self) -> tuple[Tensor, Tensor]:
        """The mask and its bits, made equal in the buffers."""
        mask, bits = agreed(self.mask, self.mask_bits, self.in_features, self._derived)
        if not mask.is_meta and type(mask) is Tensor:
            self.mask, self.mask_bits = written(self.mask, mask), written(self.mask_bits, bits)
            mask, bits = self.mask, self.mask_bits
        return mask, bits

    def _zero(self, weight: Tensor, mask: Tensor) -> bool:
        """Set the weight to 0 outside the mask where it changed; False for a weight that is not ours to write to."""
        zeroed = None if self._swapped else weights.zeroed(weight, mask, self._zeroed)
        if zeroed is not None and zeroed is not self._zeroed:
            self._zeroed = zeroed
        return zeroed is not None

    def _keep(self, made: Seen) -> Any:
        """What was made of the weight, remembered."""
        if made is not self._made:
            self._made = made
        return made.made

    def _fixed(self, weight: Tensor, derived: Derived, index: tuple[Any, ...]) -> Pattern | None:
        """The pattern with the single weights as the CPU kernel reads them, while nothing trains."""
        trains = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if trains or derived.chosen != "unstructured" or not weights.packable(weight):
            return None
        return self._keep(weights.packed(weight, index, self._made))

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        mask = self.mask
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            if self.mask is not mask:  # whatever it became: type() casts it, to_empty() empties it
                device = self.mask.device
                known = not mask.is_meta or self.mask.is_meta
                self.mask = mask.to(device) if known else torch.ones(mask.shape, dtype=torch.bool, device=device)
            self.mask_bits = pack_mask(self.mask)
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
            self._zeroed = self._zeroed._replace(mark=None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name, weight = prefix + BITS, self._given("weight")
        bits, mask, assign = state_dict.get(name), None, local_metadata.get("assign_to_params_buffers")
        if bits is not None:
            try:
                validation.packed_mask(name, bits, weight, anywhere=True)
                mask = unpack_mask(bits, self.in_features)
                resolve(self.pattern, mask, weight)
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
            if not self._zero(weight, self.mask) and hasattr(weight, "device_mesh"):
                weights.zero_shards(weight, self.mask)
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
            self.register_buffer(BITS, pack_mask(self.mask))
        self._derive()


def _wrapped(t: Tensor) -> bool:
    return transforms.active() and torch._C._functorch.is_functorch_wrapped_tensor(t)
