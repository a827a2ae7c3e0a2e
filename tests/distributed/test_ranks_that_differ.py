"""Ranks that call differently get one error on each, with ranks and values, and can go on; none waits for another."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shared_batches import Shared, compare, on_rank

import pycse
from pycse import losses

FINE = Shared((3, 4))


def calls(rank, group, changes):
    """fused_infonce with what ``changes`` has for this rank."""
    given = dict(z1=torch.randn(4, 8, requires_grad=True), z2=torch.randn(4, 8, requires_grad=True), temperature=0.1)
    function = pycse.fused_infonce
    change = dict(changes[rank])
    if "function" in change:
        function = getattr(pycse, change.pop("function"))
        given.pop("temperature")
    with torch.set_grad_enabled(change.pop("grad", True)):
        return float(function(**{**given, **change}, group=group))


@pytest.mark.parametrize(
    "changes, text",
    [
        (({}, {"temperature": 0.2}), "temperature is 0.1 on rank 0 and 0.2 on rank 1"),
        (({}, {"temperature": torch.tensor(0.1)}), "temperature is 0.1 on rank 0 and a number in a tensor on rank 1"),
        (
            ({}, {}, {"z1": torch.ones(4, 6), "z2": torch.ones(4, 6)}),
            "features of z1 is 8 on ranks 0, 1 and 6 on rank 2",
        ),
        (
            ({}, {"z1": torch.ones(4, 8).double(), "z2": torch.ones(4, 8).double()}),
            "dtype of z1 is torch.float32 on rank 0",
        ),
        (({}, {"weight": torch.ones(4)}), "weight is not given on rank 0 and given on rank 1"),
        (({}, {"symmetric": True}), "symmetric is False on rank 0 and True on rank 1"),
        (({}, {"grad": False}), "gradients is True on rank 0 and False on rank 1"),
        (({}, {"z2": torch.ones(4, 8)}), "gradients of is z1, z2 on rank 0 and z1 on rank 1"),
        (({}, {"function": "fused_sigmoid"}), "function is fused_infonce on rank 0 and fused_sigmoid on rank 1"),
        (({"replicated_keys": 1}, {"replicated_keys": 2}), "replicated_keys is 1 on rank 0 and 2 on rank 1"),
        (({}, {"exchange": "ring"}), "exchange is 'auto' on rank 0 and 'ring' on rank 1"),
        (({}, {"reduction": "sum"}), "reduction is 'mean' on rank 0 and 'sum' on rank 1"),
        (
            ({}, {"query_ids": torch.arange(4), "key_ids": torch.arange(4)}),
            "query_ids is None on rank 0 and torch.int64",
        ),
        (({"dims": [4, 8]}, {"dims": [8, 4]}), "dims is [4, 8] on rank 0 and [8, 4] on rank 1"),
        (({"dims": [4, 8]}, {}), "dims is [4, 8] on rank 0 and not given on rank 1"),
        (
            ({"dims": [4], "dim_weights": [1.0]}, {"dims": [4]}, {"dims": [4], "dim_weights": [0.5]}),
            "dim_weights is [1.0] on ranks 0, 1 and [0.5] on rank 2",
        ),
        (
            ({"dims": [4, 8], "temperature": [0.1, 0.2]}, {"dims": [4, 8], "temperature": [0.1, 0.3]}),
            "temperature is [0.1, 0.2] on rank 0 and [0.1, 0.3] on rank 1",
        ),
        (({"dims": [4, 8], "temperature": [0.1, 0.2]}, {"dims": [4, 8]}), "temperatures is True on rank 0 and False"),
        (
            ({"function": "fused_sigmoid", "dims": [4]}, {"function": "fused_sigmoid", "dims": [4, 8]}),
            "dims is [4] on rank 0 and [4, 8] on rank 1",
        ),
        (
            ({"function": "fused_sigmoid", "dims": [4, 8]}, {"function": "fused_sigmoid"}),
            "function is fused_sigmoid with dims on rank 0 and fused_sigmoid on rank 1",
        ),
    ],
    ids=str,
)
def test_ranks_that_disagree_all_raise(ranks, changes, text):
    outcomes = ranks.outcomes(len(changes), calls, changes)
    for fine, result in outcomes:
        assert not fine and result[0] is ValueError, result
        assert text in result[1], result[1]
    compare(FINE, ranks.run(2, on_rank, FINE))  # the group is as good as before


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number > 0, got -1.0"),
        ({"z1": "no tensor"}, TypeError, "z1 must be a torch.Tensor"),
        ({"z1": torch.ones(3, 0)}, ValueError, "z1 must have at least one row and one feature"),
        ({"guide_logits": torch.ones(4, 4)}, ValueError, "guide_logits and group exclude each other"),
        (
            {"z1": torch.ones(4, 8, device="meta"), "z2": torch.ones(4, 8, device="meta")},
            RuntimeError,
            "group must have a backend for meta tensors",
        ),
        (
            {"z1": torch.ones(0, 8), "z2": torch.ones(0, 8), "weight": torch.ones(3)},
            ValueError,
            "weight must have shape",
        ),
        ({"negatives": ([0], [])}, TypeError, "negatives[0] must be an integer tensor"),
        ({"dims": [4, 9]}, ValueError, "dims must lie in [1, 8] (the embeddings' features), got 9"),
        ({"dims": 4}, TypeError, "dims must be a list of lengths, got 4"),
        ({"dims": [4], "temperature": [0.1, 0.2]}, ValueError, "temperature must be one number, or one for each"),
        ({"dim_weights": [1.0]}, ValueError, "dim_weights must be given together with dims"),
        ({"function": "fused_sigmoid", "dims": [4, 9]}, ValueError, "dims must lie in [1, 8]"),
        ({"function": "fused_sigmoid", "parts": True}, ValueError, "parts must be given together with dims"),
        ({"exchange": "post"}, ValueError, "exchange must be one of"),
        ({"replicated_keys": 5}, ValueError, "replicated_keys must lie in [0, 4]"),
        ({"positives": torch.tensor([0, 1, 2, 9])}, ValueError, "positives must lie in [0, 3]"),
    ],
    ids=str,
)
def test_an_error_of_one_rank_is_every_ranks(ranks, change, kind, text):
    mine, others = ranks.outcomes(2, calls, [change, {}])
    assert not mine[0] and issubclass(mine[1][0], kind) and text in mine[1][1], mine
    assert not others[0] and others[1][0] is RuntimeError, others
    assert "rank 0" in others[1][1] and text in others[1][1]
    compare(FINE, ranks.run(2, on_rank, FINE))


def test_lengths_do_not_travel(ranks):
    for fine, result in ranks.outcomes(2, calls, [{"dims": [4, 8], "exchange": "ring"}] * 2):
        assert not fine and result[0] is ValueError and "exchange='ring' and dims exclude each other" in result[1]
    compare(FINE, ranks.run(2, on_rank, FINE))


def drawn(rank, group, kind):
    """The lengths that a module takes in each of 12 steps; an evaluation of rank 0 alone draws none."""
    torch.manual_seed(rank)
    loss, taken = kind(dims=[2, 4, 8], dim_weights=[1.0, 2.0, 3.0], n_dims_per_step=2, group=group), []
    z1, z2, draw = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), loss.drawn
    loss.drawn = lambda options: taken.append(draw(options)) or taken[-1]
    for step in range(12):
        loss(z1, z2).backward()
        if rank == 0 and step == 3:
            loss.eval().options["group"] = None
            loss(z1, z2)
            loss.train().options["group"] = group
    return [step["dims"] for step in taken if len(step["dims"]) == 2]


@pytest.mark.parametrize("kind", [losses.InfoNCELoss, losses.SigmoidLoss])
def test_lengths_are_drawn_alike(ranks, kind):
    one, other = ranks.run(2, drawn, kind)
    assert one == other and len(one) == 12
    assert {tuple(step) for step in one} == {(2, 4), (2, 8), (4, 8)}


def counted_hard_negatives(rank, group):
    z1 = torch.randn(4, 8)
    z2 = torch.randn((2 + rank) * 4, 8)
    return float(pycse.fused_infonce(z1, z2, hard_negative_weight=0.5, group=group))


def test_hard_negatives_are_the_same_number_everywhere(ranks):
    for fine, result in ranks.outcomes(2, counted_hard_negatives):
        assert not fine and result[0] is ValueError
        assert "the same K on every rank" in result[1] and "N = [8, 12] for B = [4, 4]" in result[1]


def no_rows(rank, group):
    z = torch.zeros(0, 8)
    return float(pycse.fused_infonce(z, z, group=group))


def test_a_batch_without_rows(ranks):
    for fine, result in ranks.outcomes(2, no_rows):
        assert not fine and "z1 must have at least one row on some rank" in result[1]


def outside(rank, group):
    others = dist.new_group([0])
    z = torch.eye(3)
    return float(pycse.fused_infonce(z, z, group=others))


def test_a_rank_outside_the_group(ranks):
    # new_group is a call of all ranks of the world.
    inside, *others = ranks.outcomes(4, outside)
    assert inside[0]
    for fine, result in others:
        assert not fine and "group must hold the process that calls" in result[1]


def ended(rank, group):
    gone = dist.new_group()
    dist.destroy_process_group(gone)
    z = torch.eye(3)
    return float(pycse.fused_infonce(z, z, group=gone))


def test_a_group_that_has_ended(ranks):
    for fine, result in ranks.outcomes(4, ended):
        assert not fine and "group must be alive" in result[1]


def test_group_without_torch_distributed():
    z = torch.eye(3)
    with pytest.raises(RuntimeError, match=re.escape("group='world' needs torch.distributed")):
        pycse.fused_infonce(z, z, group="world")
    with pytest.raises(TypeError, match="group must be None, 'world' or a torch.distributed.ProcessGroup, got 3"):
        pycse.fused_infonce(z, z, group=3)


def transformed(rank, group):
    z = torch.eye(3)
    return torch.func.grad(lambda z1: pycse.fused_infonce(z1, z, group=group))(z)


def test_transforms_are_refused(ranks):
    for fine, result in ranks.outcomes(2, transformed):
        assert not fine and "group cannot be given inside torch.func's transforms" in result[1]


def _dies(rank, store, pipe):
    import datetime
    import os

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    z = torch.eye(3, requires_grad=True)
    loss = pycse.fused_infonce(z, z, group="world")
    if rank == 1:
        os._exit(9)
    try:
        loss.backward()
        pipe.send("no error")
    except RuntimeError as error:
        pipe.send(str(error))


def test_a_rank_that_dies_is_noticed(tmp_path):
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    processes = [context.Process(target=_dies, args=(rank, str(tmp_path / "store"), there)) for rank in range(2)]
    for process in processes:
        process.start()
    assert here.poll(90), "the rank that is left waits for ever"
    assert "could not exchange gradients" in here.recv()
    for process in processes:
        process.join(10)
        process.kill()
