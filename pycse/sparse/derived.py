"""What follows from a layer's mask: its bits, the pattern to compute with, the lists that kernels read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pycse import validation
from pycse.ops import sparse as ops
from pycse.pattern import pack_mask, unpack_mask
from pycse.sparse.choice import SIDES, resolve

BITS = "mask_bits"  # the mask packed, as it is saved


@dataclass(frozen=True)
class Derived:
    """What follows from a mask, and how the buffers were that it followed from."""

    mask: Tensor
    bits: Tensor
    versions: tuple[int, int]
    like: tuple[torch.dtype, torch.device, torch.Size]  # of the weight
    packed: Tensor | None = None  # a copy of the bits; None while they have no values
    chosen: str = "dense"
    reason: str = ""
    operands: tuple[Any, ...] = ()  # of the operator: the pattern's lists and the side of its blocks; empty if dense

    def holds(self, mask: Tensor | None, bits: Tensor | None, weight: Tensor) -> bool:
        """Whether nothing that this followed from has changed, as far as versions tell."""
        return (
            mask is self.mask
            and bits is self.bits
            and self.versions == (mask._version, bits._version)  # type: ignore[union-attr]
            and self.like == like(weight)
        )


def like(weight: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return weight.dtype, weight.device, weight.shape


def derive(pattern: str, mask: Tensor, bits: Tensor, weight: Tensor, known: Derived | None) -> Derived:
    """Pattern and lists of a mask and its bits; those of ``known``, with its ``packed``, where they still are right."""
    result = Derived(mask, bits, (mask._version, bits._version), like(weight))
    if mask.is_meta or weight.is_meta or type(mask) is not Tensor:  # until values are loaded
        return result
    if known is not None and known.like == result.like and known.packed is not None and torch.equal(known.packed, bits):
        return replace(known, mask=mask, bits=bits, versions=result.versions)  # DDP writes what was there
    name, reason = resolve(pattern, mask, weight)
    operands: tuple[Any, ...] = ()
    if name in SIDES:
        operands = (*ops.pattern_of(mask, SIDES[name]).tensors, SIDES[name])
    return replace(result, packed=bits.clone(), chosen=name, reason=reason, operands=operands)


def agreed(mask: Tensor, bits: Tensor, in_features: int, known: Derived | None) -> tuple[Tensor, Tensor]:
    """The values of the mask and its bits: the one that changed since ``known`` counts, the mask if both did."""
    if mask.is_meta and not bits.is_meta:  # values came one by one
        mask = unpack_mask(bits, in_features)
    if mask.is_meta or type(mask) is not Tensor:
        return mask, bits
    packed = pack_mask(mask)
    if known is not None and known.packed is not None and not bits.is_meta:
        validation.packed_mask(BITS, bits, mask, anywhere=True)
        bits = bits.to(packed.device)
        if not torch.equal(bits, packed) and torch.equal(known.packed.to(packed.device), packed):
            return unpack_mask(bits, in_features), bits
    return mask, packed


def written(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer with another value, in place where it can be (not inference tensors: they count no changes)."""
    if buffer is value and not buffer.is_inference():
        return buffer
    if buffer.is_inference() or (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device):
        return value.clone()
    return buffer if torch.equal(buffer, value) else buffer.copy_(value)
