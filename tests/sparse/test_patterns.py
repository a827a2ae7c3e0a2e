"""Which weights are kept: lists by rows and by columns, orders of use, packed masks, and the choice of a pattern."""

from __future__ import annotations

import pytest
import torch
from pycse.kernels import native
from sparse_layers import BLOCKS, NAMES, random_mask

from pycse.ops.sparse import pattern_of
from pycse.pattern import pack_mask, unpack_mask
from pycse.sparse.choice import break_even, choose


@pytest.mark.parametrize("block", BLOCKS)
def test_choice(block):
    limit = break_even("cpu", torch.float32)[NAMES[block]]
    sides = 640 // block
    kept = torch.zeros(sides * sides, dtype=torch.bool)
    kept[
        torch.randperm(sides * sides, generator=torch.Generator().manual_seed(0))[: int(limit * sides * sides * 0.9)]
    ] = True
    mask = kept.view(sides, sides).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert choose(mask, torch.float32, "cpu").pattern == NAMES[block]
    choice = choose(torch.ones(640, 640, dtype=torch.bool), torch.float32, "cpu")
    assert choice.pattern == "dense" and "sparse pays below" in choice.reason
    assert choose(mask, torch.float32, "mps").pattern == "dense"
    thin = choose(torch.ones(48, 48, dtype=torch.bool), torch.float32, "cpu")  # only blocks of 16 fit
    assert thin.reason.endswith(f"below a density of {break_even('cpu', torch.float32)['block16']:.0%}")


@pytest.mark.parametrize("block", BLOCKS)
def test_patterns_are_lists_by_rows_and_by_columns(block):
    mask = random_mask(192, 128, block, 0.4)
    p = pattern_of(mask, block)
    assert torch.equal(p.mask(), mask) and p.density == pytest.approx(mask.float().mean().item())
    t = pattern_of(mask.t(), block)
    assert torch.equal(p.t_ptr, t.ptr) and torch.equal(p.t_rows, t.cols)
    assert all(i.dtype == torch.int32 for i in p.tensors)
    assert torch.equal(p.t_plan, t.plan) or block == 1  # which differ in where a weight stands in the list by rows
    assert (p.plan.numel() == 0) == (block > 1)


@pytest.mark.parametrize(
    "out, in_, density", [(5, 300, 0.3), (200, 128, 0.1), (64, 7, 1), (9, 129, 0), (3, 0, 1), (0, 4, 1)]
)
def test_plans_use_every_kept_weight_once(out, in_, density):
    mask = random_mask(out, in_, 1, density)
    p = pattern_of(mask)
    rows = torch.arange(out).repeat_interleave(p.ptr.long().diff())
    for plan, results, features, transposed in ((p.plan, out, in_, False), (p.t_plan, in_, out, True)):
        chunk, step = native().SPARSE_CHUNK, native().SPARSE_AT_STEP
        chunks = max(1, -(-features // chunk))
        lengths, order, source, at = plan.split(
            [chunks * (chunk + 1), chunks * results, p.nnz, -(-p.nnz // 2)]  # 16-bit places, two in each
        )
        place, used = at.view(torch.int16)[: p.nnz].long() // step, []
        for q, (many, of) in enumerate(zip(lengths.view(chunks, -1), order.view(chunks, results))):
            assert sorted(of.tolist()) == list(range(results)) and many.sum() == results
            counts = torch.arange(chunk + 1).repeat_interleave(many.long())
            used += [torch.stack([of.long().repeat_interleave(counts), torch.full((int(counts.sum()),), q * chunk)])]
        result, begin = torch.cat(used, 1)
        feature, source = begin + place, source.long()
        row, column = (feature, result) if transposed else (result, feature)
        assert torch.equal(row, rows[source]) and torch.equal(column, p.cols[source].long())
        assert torch.equal(source.sort().values, torch.arange(p.nnz))


@pytest.mark.parametrize("in_", [0, 1, 31, 32, 33, 64, 100])
def test_packed_masks(in_):
    mask = random_mask(5, in_, 1, 0.5 if in_ else 1)
    bits = pack_mask(mask)
    assert bits.dtype == torch.int32 and bits.shape == (5, -(-in_ // 32))
    assert torch.equal(unpack_mask(bits, in_), mask)
    for row, column in ((0, 0), (4, in_ - 1)) if in_ else ():
        assert bool(bits[row, column // 32].item() >> column % 32 & 1) == mask[row, column]
    wide = torch.zeros(5, in_ + 3, dtype=torch.bool)  # rows that begin anywhere
    wide[:, 3:] = mask
    assert torch.equal(pack_mask(wide[:, 3:]), bits)
