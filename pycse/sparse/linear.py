"""SparseLinear, a Linear layer that computes only what its mask keeps, and masked_linear, its function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycse import validation
from pycse.backends import CHOICES
from pycse.kernels import native
from pycse.ops import sparse as ops
from pycse.sparse import pattern as patterns
from pycse.sparse.pattern import PATTERNS, SIDES, Pattern

# Buffers that are not saved; None where the pattern has no index.
INDEX = ("ptr", "cols", "t_ptr", "t_rows", "plan", "t_plan")
BITS = "mask_bits"  # what the mask is called in a state_dict, packed


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
        mask: bool (out, in), True where a weight is kept; or the same packed, int32 (out, ceil(in / 32)) with bit j of word
            k for column 32 k + j (``pycse.sparse.pattern.pack_mask``).
        bias: (out,) or None.
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.

    Returns:
        (..., out) in x's dtype; under autocast as F.linear.

    Nothing of the mask is kept between calls: it may change. Packing it takes as long as reading W; pack it once to save that.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named, before any work.
        RuntimeError: the backend named cannot run here.
    """
    validation.linear(x, weight, bias)
    if isinstance(mask, Tensor) and mask.dtype == torch.int32:
        validation.packed_mask("mask", mask, weight)
        bits = mask
    else:
        validation.linear_mask("mask", mask, weight)
        bits = patterns.pack_mask(mask)
    validation.choice("backend", backend, CHOICES)
    y = ops.masked_linear(x.reshape(-1, x.shape[-1]), weight, bias, bits, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


class SparseLinear(nn.Linear):
    r"""nn.Linear under a mask: y = x (W ⊙ M)^T + b, computing only the kept weights where that is faster.

    ``weight`` is dense, of nn.Linear's name and shape. What lies outside ``mask`` (bool, a buffer) counts as 0 and is set to 0:
    when the mask changes, when the layer is saved, and before dense products after the weight changed (through
    ``weight.data`` this shows at the next ``train()`` or ``eval()``). Gradients there are exactly 0 whatever the pattern, so
    optimizers leave the zeros alone. Products with removed weights are not computed:
    0 · Inf and 0 · NaN give nothing there, where a dense layer gives NaN.

    state_dict holds weight, bias, and the mask packed: ``mask_bits``, int32 (out, ceil(in / 32)), bit j of word k for column
    32 k + j. One without ``mask_bits``, as loaders that know no masks give it, is loaded under the layer's own mask. The
    pattern's index is not saved: it is derived from the mask again when the mask, device or dtype changes
    (state_dict, ``to``, ``mask`` itself, also in place). A compiled layer keeps the mask that it was compiled with.

    In ``eval()`` without gradients single weights are packed for the CPU kernel once, not at every call: density · out · in
    numbers more, made again when the weight changes (through ``weight.data``: where one of some 500 numbers spread over it does,
    else at the next ``train()`` or ``eval()``).

    Args:
        mask: bool (out, in), True where a weight is kept; default: every weight.
        pattern: "auto" (the fastest, or "dense" where sparse does not pay: ``repr`` says why), "unstructured", "block16",
            "block32", "block64" (masks made of whole square blocks), "2:4" (NVIDIA GPUs) or "dense".
        backend: "auto", "reference", "torch", "cpu", "triton" or "cuda"; see ``pycse.info()``.
        in_features, out_features, bias, device, dtype: as nn.Linear; float32, float64, bfloat16 or float16.

    Forward takes x (..., in) of the weight's dtype (any under autocast) and gives (..., out).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, or a mask that the pattern named cannot hold.
        RuntimeError, in forward: the backend named cannot run here.
    """

    mask: Tensor
    chosen: str  # the pattern in use, and why
    reason: str
    _source: (
        tuple[Tensor, int, torch.dtype, torch.device, torch.Size] | None
    )  # what pattern and index were derived from
    _zeroed: tuple[Tensor, int] | None  # the weight that is 0 outside the mask
    # What tells that a weight changed, what a kernel reads in its place, and the weight.
    _made: tuple[Any, Any, Tensor] | None = None

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
        self.register_buffer("mask", mask.detach().clone(), persistent=False)
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
        result.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if linear.bias is not None:
            result.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        result.mask = mask.detach().clone()
        result._derive()
        return result.train(linear.training)

    def densify(self) -> nn.Linear:
        """A plain nn.Linear with the same values: zeros outside the mask, and nothing that keeps them."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().masked_fill(~self.mask, 0), self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and self._stale():
            self._derive()
        validation.linear(input, self.weight, self.bias)
        if self.chosen in SIDES:
            x = input if input.dim() == 2 else input.reshape(-1, self.in_features)
            index = (*self._index(), SIDES[self.chosen], self.backend)
            y = ops.sparse_linear(x, self.weight, self.bias, *index, pattern=None if compiling else self._fixed(index))
            return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)
        weight = self.weight
        if not self._zero() and not compiling:
            weight = weight.masked_fill(~self.mask, 0)
        elif torch.is_grad_enabled() and weight.requires_grad:
            weight = _KeptGradient.apply(weight, self.mask)
        elif self.chosen == "2:4":
            weight = self._semi_structured()
        return F.linear(input, weight, self.bias)

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

    def _index(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in INDEX)  # type: ignore[misc]

    def _stale(self) -> bool:
        if self._source is None:
            return True
        known, version, *rest = self._source
        mask, weight = self.mask, self.weight
        return mask is not known or _version(mask) != version or rest != [weight.dtype, weight.device, weight.shape]

    def _derive(self) -> None:
        """Pattern and index from the mask; the weight is set to 0 outside it."""
        mask, weight = self.mask, self.weight
        validation.linear_mask("mask", mask, weight)
        self._made = self._zeroed = None
        for name in INDEX:
            self.register_buffer(name, None, persistent=False)
        self.chosen, self.reason, self._source = "dense", "", None
        if mask.is_meta or weight.is_meta:  # until values are loaded
            return
        with torch.inference_mode(False), torch.no_grad():
            self.chosen, self.reason = _chosen(self.pattern, mask, weight)
            if self.chosen in SIDES:
                for name, t in zip(INDEX, Pattern.from_mask(mask, SIDES[self.chosen]).tensors):
                    self.register_buffer(name, t, persistent=False)
        self._zero()
        self._source = (mask, _version(mask), weight.dtype, weight.device, weight.shape)

    def _zero(self) -> bool:
        """Set the weight to 0 outside the mask where it changed; False for a weight that is not ours to write to.

        Optimizers write there: what was removed after they took steps still has momentum. Merging of adapters does as well.
        """
        weight, known = self.weight, self._zeroed
        if type(weight) is not nn.Parameter or torch.compiler.is_compiling():
            return False
        if known is not None and known[0] is weight and known[1] == _version(weight):
            return True
        if weight.is_meta or (weight.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        with torch.no_grad():
            # A write breaks the backward pass of an earlier forward, unless somebody wrote already.
            written = known is not None and known[0] is weight
            if written or weight.masked_fill(self.mask, 0).any():
                weight.masked_fill_(~self.mask, 0)
        self._zeroed = weight, _version(weight)
        return True

    def _semi_structured(self) -> Tensor:
        """PyTorch's compressed 2:4 weight; made again when the weight changes (a write to ``weight.data`` does not show)."""
        if self._made is None or self._made[0] != _version(self.weight):
            made = torch.sparse.to_sparse_semi_structured(self.weight.detach())
            self._made = _version(self.weight), made, self.weight
        return self._made[1]

    def _fixed(self, index: tuple[Any, ...]) -> Pattern | None:
        """The pattern with the single weights as the CPU kernel reads them, while nothing trains; made again when they change."""
        weight = self.weight
        if self.training or torch.is_grad_enabled() or self.chosen != "unstructured":
            return None
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
            return None
        of = (id(weight), weight.data_ptr(), _version(weight), native().fingerprint(weight.data_ptr(), weight.nbytes))
        if self._made is None or self._made[0] != of:
            self._made = of, ops.packed(weight, *index), weight  # alive, so that no other weight has its id
        return self._made[1]

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self._buffers["mask"] = self.mask.bool()  # type() casts everything
        try:
            self._derive()
        except ValueError:  # a pattern that does not run there, or no values yet (to_empty): forward says so, if asked
            self._source = None
        return self

    def train(self, mode: bool = True) -> SparseLinear:
        self._made = self._zeroed = None  # writes to weight.data do not show
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix + BITS
        bits, mask = state_dict.get(name), None
        if bits is not None:
            try:
                validation.packed_mask(name, bits, self.weight, anywhere=True)
                mask = patterns.unpack_mask(bits, self.in_features)
                _chosen(self.pattern, mask, self.weight)
            except (TypeError, ValueError) as error:  # before anything is changed
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        if name in unexpected_keys:
            unexpected_keys.remove(name)
        if mask is not None:
            if local_metadata.get("assign_to_params_buffers"):
                self.mask = mask
            elif not self.mask.is_meta:
                self.mask.copy_(mask)
        self._derive()

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._zeroed = None
        self._zero()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + BITS] = patterns.pack_mask(self.mask)

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: None if name in INDEX else t for name, t in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers, "_source": None, "_zeroed": None, "_made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._derive()


class _KeptGradient(torch.autograd.Function):
    """The weight itself, with a gradient of exactly 0 outside the mask."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

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


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
