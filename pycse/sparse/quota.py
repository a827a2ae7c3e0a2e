"""Which groups go: exactly a share of them, those of the lowest scores.

A group is a weight, a block, a head or a neuron; every layer brings a 1-d tensor of its groups' scores. Of equal scores
the earlier group goes first, so the choice is one and the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCOPES = ("global", "layer")


def counted(share: float, groups: int) -> int:
    """The number of groups that is a share of them, to the nearest."""
    return int(share * groups + 0.5)


def keep_above(scores: Sequence[Tensor], share: float, scope: str, least: int = 0) -> list[Tensor]:
    """Bool, True where a group stays, for every layer.

    Args:
        scores: of the groups of each layer, 1-d, finite; -inf for a group that is gone already.
        share: of all groups that go.
        scope: "global" compares all layers' groups; "layer" takes the share of each by itself.
        least: groups that every layer keeps.

    Raises:
        ValueError: so many groups cannot go, or more are gone already.
    """
    sizes = [len(s) for s in scores]
    if scope == "layer":
        counts = [counted(share, size) for size in sizes]
        for size, count in zip(sizes, counts):
            if count > size - least:
                raise ValueError(
                    f"sparsity {share:g} removes {count} of the {size} groups of a layer, which keeps at least {least}"
                )
        kept = [lowest(s, count) for s, count in zip(scores, counts)]
        remove = sum(counts)
    else:
        remove = counted(share, sum(sizes))
        if remove > sum(max(0, size - least) for size in sizes):
            raise ValueError(
                f"sparsity {share:g} removes {remove} of {sum(sizes)} groups, but each of {len(sizes)} layers keeps at "
                f"least {least}"
            )
        # The best groups of a layer cannot go.
        guarded = [s if not least else s.index_fill(0, s.topk(min(least, len(s))).indices, torch.inf) for s in scores]
        device = guarded[0].device
        joint = lowest(torch.cat([s.to(device) for s in guarded]), remove).split(sizes)
        kept = [k.to(s.device) for k, s in zip(joint, scores)]
    for s, k in zip(scores, kept):
        gone = s.isneginf()
        if (gone & k).any():
            total = sum(int(one.isneginf().sum()) for one in scores)
            raise ValueError(
                f"sparsity {share:g} removes {remove} of {sum(sizes)} groups, but {total} are gone already; "
                f"ask for more, or densify() first"
            )
    return kept


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool, False at the ``count`` lowest of a 1-d tensor, of equal ones the first."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count).values
    kept = scores > last
    ties = (scores == last).nonzero().squeeze(1)
    kept[ties[count - int((scores < last).sum()) :]] = True
    return kept
