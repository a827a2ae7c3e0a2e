"""The benchmark of training over processes, and the model of its cost: what is counted and how, no time."""

import sys
from pathlib import Path

import pytest
from columns_of_texts import ANCHORS, NEGATIVES, POSITIVES
from tiny_models import needs_extras, tiny_model  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside this package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import ranks, scaling  # noqa: E402
from benchmarks.collectives import Call  # noqa: E402
from pycse.training.errors import UserError  # noqa: E402

PAIRS = [*zip(ANCHORS, POSITIVES), *zip(POSITIVES, NEGATIVES)]


@needs_extras
def test_training_over_two_processes(tiny_model):  # noqa: F811
    B, W, D = 4, 2, 32
    found = ranks.measured(W, B, 1, 2, tiny_model, PAIRS)
    assert len(found) == W and found[0].parity == found[1].parity
    for one in found:
        assert {kind: len(steps) for kind, steps in one.steps.items()} == {"gathered": 2, "apart": 2, "alone": 2}
        for kind, steps in one.steps.items():
            for step in steps:
                kinds = [call.kind for call in ranks.of_loss(step)]
                assert kinds == ([] if kind == "alone" else [*["all_gather"] * 4, "reduce_scatter"])
                assert any(call.waiting for call in step.calls) == (kind == "apart")
        calls = ranks.of_loss(one.steps["gathered"][0])
        assert [call.what for call in calls] == ["headers", "keys", "headers", "keys", "gradients"]
        headers, texts, _, keys, gradients = (call.bytes for call in calls)
        assert headers == W * 6 * 8 and texts == 2 * W * B * 8 and keys >= W * B * D * 4 == gradients
    said = ranks.table(found, B)
    assert said.row_count == 3 + 5 + 2 and "of a step" in ranks.verdict(found)


def test_more_rows_than_texts():
    with pytest.raises(UserError, match="3 rounds of 2 x 4 rows need 24 pairs of sentences, there are 16"):
        ranks.measured(2, 4, 1, 3, "no model", PAIRS)


def test_shares():
    """Medians over steps of the ranks' means; DDP's are none of the loss'."""

    def step(seconds, *calls):
        return ranks.Step(seconds, [Call("all_gather", what, 8, 0.0, spent) for what, spent in calls])

    slow = [step(1.0, ("headers", 0.1), (ranks.DDP, 0.5)), step(2.0, ("headers", 0.2)), step(1.0, ("headers", 0.9))]
    quick = [step(1.0, ("headers", 0.3)), step(2.0, ("headers", 0.2)), step(1.0, ("headers", 0.9))]
    found = [ranks.Measured("", (0.0, 0.0), {"gathered": steps}) for steps in (slow, quick)]
    assert ranks.share(found) == pytest.approx(0.2) and ranks.share(found, max) == pytest.approx(0.3)
    assert "above both" in ranks.verdict(found)


def test_bytes_are_those_of_the_formulas():
    rows = scaling.counted((2,)).splitlines()  # raises where they are not
    assert len(rows) == 2 + len(scaling.CALLS) * len(scaling.DTYPES)
    text = scaling.DOCUMENT.read_text()
    for row in rows[2:]:
        call, dtype, count = (cell.strip() for cell in row.strip("|").split("|"))
        assert f"| {call} | {dtype} | " in text and f" | {count} | " in text


def test_the_document_is_the_models():
    text = scaling.DOCUMENT.read_text()
    model = {name: part for name, part in scaling.PARTS.items() if name != "counted"}
    assert scaling.render(text, model) == text, "docs/scaling.md is out of date: python -m benchmarks scaling"
    for name in scaling.PARTS:
        assert text.count(f"<!-- bench {name} -->") == 1


def test_costs():
    gather, ring = (scaling.cost(x, 4, 4096, 64, "bf16") for x in scaling.EXCHANGES)
    assert gather.memory == 4096 * 64 * 8 and ring.memory == 1024 * 64 * (3 * 2 + 5 * 4)
    assert gather.network == 3072 * 64 * 6 and ring.network == 3072 * 64 * 8
    assert gather.operations * 8 == ring.operations * 6 == 6 * 8 * 1024 * 4096 * 64
    assert scaling.cost("gather", 1, 4096, 64, "fp32").network == 0
