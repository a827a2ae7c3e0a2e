"""The losses of columns on several processes, against one process with the joined batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES
from ranks import Ranks
from tiny_models import missing, needs_extras

pytestmark = needs_extras
if not missing:
    import sentence_transformers as st

    from pycse import sentence_transformers as ours

ROWS = (5, 3)
# Rows 1 and 6, which ranks do not share, have one anchor; rows 2 and 7 one positive.
TEXTS = (
    [*ANCHORS[:6], ANCHORS[1], ANCHORS[7]],
    [*POSITIVES[:7], POSITIVES[2]],
    [*NEGATIVES[:7], POSITIVES[0]],
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.end()


def loss_of(kind, model, group):
    options = {"group": group}
    if kind == "infonce":
        return ours.InfoNCELoss(model, **options)
    if kind == "ring":
        return ours.InfoNCELoss(model, exchange="ring", **options)
    if kind == "directions":
        return ours.InfoNCELoss(model, directions=("query_to_doc", "doc_to_doc"), **options)
    if kind == "focal, trained":
        return ours.FocalInfoNCELoss(model, torch.nn.Parameter(torch.tensor(0.1)), **options)
    if kind == "cached":
        return ours.CachedFocalInfoNCELoss(model, mini_batch_size=2, **options)
    if kind == "cached, trained":
        return ours.CachedInfoNCELoss(model, torch.nn.Parameter(torch.tensor(0.1)), mini_batch_size=2, **options)
    if kind == "supcon":
        return ours.SupConLoss(model, **options)
    if kind.startswith("lengths"):
        options |= {"temperature": torch.nn.Parameter(torch.tensor([0.05, 0.1, 0.2])), "dims": [32, 8, 16]}
        options["dim_weights"] = [1.0, 0.5, 2.0]
        if kind == "lengths, cached":
            return ours.CachedInfoNCELoss(model, mini_batch_size=2, **options)
        return {"lengths": ours.MatryoshkaInfoNCELoss, "lengths, supcon": ours.SupConLoss}[kind](model, **options)
    if kind == "guided":
        return ours.GuidedInfoNCELoss(model, model_at(options.pop("path"), 1), **options)
    raise ValueError(kind)


def model_at(path, seed=0):
    model = st.SentenceTransformer(path, device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model


def step(path, kind, group, rows, columns, upstream=1.0, wrapped=False):
    """Loss, gradients of the model and of the loss' own numbers."""
    model = model_at(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = loss_of(kind, model, group)
        if wrapped:
            # As transformers does it: a pooler that is not used would keep its bucket waiting.
            loss.model = torch.nn.parallel.DistributedDataParallel(
                model, process_group=group, find_unused_parameters=True
            )
        texts = [column[rows] for column in TEXTS[:columns]]
        labels = torch.tensor([0, 1, 0, 1, 2, 0, 2, 1])[rows] if "supcon" in kind else None
        value = loss([dict(model.preprocess(list(column))) for column in texts], labels)
        (value * upstream).backward()
    own = [p.grad for p in loss.parameters(recurse=False)]
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), own


def on_rank(rank, group, path, kind, columns):
    begin = sum(ROWS[:rank])
    return step(path, kind, group, slice(begin, begin + ROWS[rank]), columns, wrapped=True)


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize(
    "kind",
    [
        "infonce",
        "ring",
        "directions",
        "focal, trained",
        "cached",
        "cached, trained",
        "supcon",
        "lengths",
        "lengths, cached",
        "lengths, supcon",
    ],  # fmt: skip
)
def test_ranks_are_the_joined_batch(ranks, tiny_model, kind, columns):
    value, gradient, numbers = step(tiny_model, kind, None, slice(None), columns)
    results = ranks.run(2, on_rank, tiny_model, kind, columns)
    mean = sum(one[0] for one in results) / 2
    torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
    for _, theirs, own in results:  # DDP has averaged them
        assert (theirs - gradient).norm() <= 3e-4 * gradient.norm()
        for a, b in zip(own, numbers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_equal_texts_are_known_over_ranks(ranks, tiny_model):
    """Without them the value is another, so that the test above would see it."""
    model = model_at(tiny_model)
    columns = [dict(model.preprocess(list(column))) for column in TEXTS[:2]]
    value = ours.InfoNCELoss(model)(columns)
    other = ours.InfoNCELoss(model, deduplicate=False)(columns)
    assert (value - other).abs() > 1e-3


def alone(path, rank, **options):
    """A rank's rows by themselves: the loss, and the gradient of its temperature."""
    loss = ours.InfoNCELoss(model_at(path), torch.nn.Parameter(torch.tensor(0.1)), **options)
    loss.state_kept = True
    begin = sum(ROWS[:rank])
    texts = [column[begin : begin + ROWS[rank]] for column in TEXTS[:2]]
    value = loss([dict(loss.model.preprocess(list(column))) for column in texts])
    value.backward()
    return value.detach(), loss.temperature.grad


def test_processes_that_do_not_gather(ranks, tiny_model):
    """Each has its own negatives; a trained temperature is one number all the same."""
    results = ranks.run(4, apart_of_two, tiny_model)
    right = [alone(tiny_model, rank) for rank in range(2)]
    for (value, gradient), (expected, _) in zip(results[:2], right):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, (right[0][1] + right[1][1]) / 2)


def apart_of_two(rank, group, path):
    """Ranks 2 and 3 repeat 0 and 1, so that the world's mean is that of two."""
    return alone(path, rank % 2, gather_across_devices=False)


def unlike(rank, group, path):
    begin = sum(ROWS[:rank])
    return step(path, "cached", group, slice(begin, begin + ROWS[rank]), 2, upstream=1.0 + rank)


def test_a_cached_loss_needs_one_upstream_gradient(ranks, tiny_model):
    for fine, result in ranks.outcomes(2, unlike, tiny_model):
        assert not fine and result[0] is ValueError
        assert "same upstream gradient" in result[1] and "[1.0, 2.0]" in result[1]


def different_losses(rank, group, path):
    return step(path, "infonce" if rank else "focal, trained", group, slice(0, 4), 2)


def test_different_losses_that_meet(ranks, tiny_model):
    for fine, result in ranks.outcomes(2, different_losses, tiny_model):
        assert not fine and result[0] is ValueError
        assert "FocalInfoNCELoss on rank 0 and InfoNCELoss on rank 1" in result[1], result[1]
