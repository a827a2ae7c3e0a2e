"""Wrong arguments: a named error before any work, on every backend alike."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch

from pycse import fused_focal_infonce, fused_infonce
from pycse.losses import FocalInfoNCELoss, InfoNCELoss
from pycse.validation.contrastive_losses import EXCLUSIVE

z = torch.randn(4, 6)
long = torch.arange(4)

BAD = [
    # what is changed, the error, what its message must say
    ({"z1": torch.randn(4)}, ValueError, r"z1 must have 2 dimensions .* got shape \(4,\)"),
    ({"z2": torch.randn(2, 4, 6)}, ValueError, r"z2 must have 2 dimensions"),
    ({"z1": [[1.0, 2.0]]}, TypeError, r"z1 must be a torch.Tensor"),
    ({"z2": torch.randn(4, 7)}, ValueError, r"z2 must have z1's 6 features, got shape \(4, 7\)"),
    ({"z2": torch.randn(3, 6)}, ValueError, r"at least z1's 4 rows .* got 3"),
    ({"z1": torch.ones(4, 6, dtype=torch.long)}, TypeError, r"z1 must be float32.* got torch.int64"),
    ({"z2": z.double()}, TypeError, r"z2 must have z1's dtype torch.float32, got torch.float64"),
    ({"z1": torch.randn(0, 6)}, ValueError, r"z1 must have at least one row"),
    ({"z2": torch.randn(0, 6)}, ValueError, r"z2 must have at least one row"),
    ({"z2": torch.randn(4, 6, device="meta")}, ValueError, r"z2 must be on z1's device cpu, got meta"),
    ({"temperature": 0}, ValueError, r"temperature must be a finite number > 0, got 0"),
    ({"temperature": -0.1}, ValueError, r"temperature .* -0.1"),
    ({"temperature": math.nan}, ValueError, r"temperature .* nan"),
    ({"temperature": math.inf}, ValueError, r"temperature .* inf"),
    ({"temperature": "0.05"}, TypeError, r"temperature must be a number or a 0-d float tensor, got '0.05'"),
    ({"temperature": True}, TypeError, r"temperature .* True"),
    ({"temperature": torch.tensor([0.05])}, ValueError, r"temperature .* shape \(1,\)"),
    ({"temperature": torch.tensor(1)}, ValueError, r"temperature .* torch.int64"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, r"temperature .* tensor holding -1.0"),
    ({"temperature": torch.tensor(math.nan)}, ValueError, r"temperature .* tensor holding nan"),
    ({"m": math.nan}, ValueError, r"m must be a finite number, got nan"),
    ({"m": torch.tensor(math.inf)}, ValueError, r"m .* tensor holding inf"),
    ({"m": None}, TypeError, r"m must be a number"),
    ({"positives": long + 1}, ValueError, r"positives must lie in \[0, 3\] .* got 4"),
    ({"positives": long - 1}, ValueError, r"positives must lie in \[0, 3\] .* got -1"),
    ({"positives": torch.arange(3)}, ValueError, r"positives must have shape \(4,\), got \(3,\)"),
    ({"positives": torch.ones(4)}, TypeError, r"positives must be an integer tensor, got torch.float32"),
    ({"positives": [0, 1, 2, 3]}, TypeError, r"positives must be a tensor"),
    ({"positives": torch.ones(4, dtype=torch.bool)}, TypeError, r"positives must be an integer tensor, got torch.bool"),
    ({"query_ids": long}, ValueError, r"key_ids must be given together with query_ids"),
    ({"key_ids": long}, ValueError, r"query_ids must be given together with key_ids"),
    ({"query_ids": long, "key_ids": torch.arange(5)}, ValueError, r"key_ids must have shape \(4,\), got \(5,\)"),
    ({"query_ids": torch.arange(5), "key_ids": long}, ValueError, r"query_ids must have shape \(4,\), got \(5,\)"),
    ({"hard_negative_weight": 1.0}, ValueError, r"hard_negative_weight needs K >= 1 hard negatives .* N = 4, B = 4"),
    ({"hard_negative_weight": math.nan}, ValueError, r"hard_negative_weight must be a finite number"),
    ({"hard_negative_weight": torch.tensor(1.0)}, TypeError, r"hard_negative_weight must be a number"),
    ({"exclude_above": math.nan}, ValueError, r"exclude_above must be a finite number"),
    ({"exclude_above": "x"}, TypeError, r"exclude_above must be a number"),
    (
        {"exclude_above": torch.tensor([0.1, math.nan, 0.1, 0.1])},
        ValueError,
        r"exclude_above must hold numbers, got NaN",
    ),
    ({"exclude_above": torch.zeros(3)}, ValueError, r"exclude_above must have shape \(4,\), got \(3,\)"),
    ({"exclude_above": long}, TypeError, r"exclude_above must be a float tensor, got torch.int64"),
    ({"exclude_by": "ratio"}, ValueError, r"exclude_by must be one of 'absolute', 'relative', 'constant', got 'ratio'"),
    ({"positive_margin": math.inf}, ValueError, r"positive_margin must be a finite number, got inf"),
    ({"positive_margin": torch.tensor(0.1)}, TypeError, r"positive_margin must be a number"),
    ({"positive_margin": 1e9}, ValueError, r"positive_margin, hardness or hard_negative_weight smaller.* 1e\+06"),
    ({"hardness": -1.0}, ValueError, r"hardness must be >= 0, got -1.0"),
    ({"hardness": "5"}, TypeError, r"hardness must be a number, got '5'"),
    (
        {"hardness": 5.0, "hardness_mode": "all"},
        ValueError,
        r"hardness_mode must be one of 'all_negatives', .* got 'all'",
    ),
    (
        {"hardness": 5.0, "hardness_mode": "hard_negatives"},
        ValueError,
        r"'hard_negatives' needs K >= 1 .* N = 4, B = 4",
    ),
    (
        {"hardness": 5.0, "hardness_mode": "in_batch_negatives", "z2": torch.randn(6, 6)},
        ValueError,
        r"'in_batch_negatives' needs N = \(K \+ 1\) B keys.* N = 6, B = 4",
    ),
    ({"guides": z}, TypeError, r"guides must be a list of pairs of embeddings"),
    ({"guides": []}, ValueError, r"guides must hold at least one guide's embeddings"),
    ({"guides": [z]}, TypeError, r"guides\[0\] must be a pair \(gq, gk\)"),
    ({"guides": [(z, torch.randn(5, 6))]}, ValueError, r"guides\[0\]\[1\] must have z2's 4 rows, got shape \(5, 6\)"),
    ({"guides": [(z, z), (z[:3], z)]}, ValueError, r"guides\[1\]\[0\] must have z1's 4 rows, got shape \(3, 6\)"),
    ({"guides": [(z, z[:, :5])]}, ValueError, r"guides\[0\] must have equal widths on both sides, got 6 and 5"),
    ({"guides": [(z, z.clone().requires_grad_())]}, ValueError, r"guides\[0\]\[1\] requires grad"),
    ({"guides": [(z, z)], "guide_weights": [1, 2]}, ValueError, r"guide_weights must be 1 numbers, one a guide"),
    ({"guides": [(z, z)], "guide_weights": [-1]}, ValueError, r"guide_weights\[0\] must be >= 0, got -1"),
    ({"guide_weights": [1]}, ValueError, r"guide_weights must be given together with guides, got None"),
    ({"guide_logits": torch.zeros(4, 5)}, ValueError, r"guide_logits must have shape \(4, 4\), got \(4, 5\)"),
    ({"guide_logits": long}, TypeError, r"guide_logits must be a float tensor of shape \(4, 4\)"),
    ({"guides": [(z, z)], "guide_above": math.nan}, ValueError, r"guide_above must be a finite number, got nan"),
    ({"guides": [(z, z)], "guide_by": "cos"}, ValueError, r"guide_by must be one of 'absolute', .* got 'cos'"),
    ({"negatives": z}, TypeError, r"negatives must be a pair \(ptr, index\) of integer tensors, got a torch.float32"),
    ({"negatives": (long,)}, TypeError, r"negatives must be a pair \(ptr, index\)"),
    ({"negatives": ([0, 1], long)}, TypeError, r"negatives\[0\] must be an integer tensor, got \[0, 1\]"),
    ({"negatives": (torch.zeros(5), long)}, TypeError, r"negatives\[0\] must be an integer tensor, got torch.float32"),
    ({"negatives": (long, long)}, ValueError, r"negatives\[0\] must have shape \(5,\), got \(4,\)"),
    ({"negatives": (torch.arange(5), z)}, ValueError, r"negatives\[1\] must have 1 dimension, got shape \(4, 6\)"),
    (
        {"negatives": (torch.arange(5), long + 8), "z2": torch.randn(9, 6)},
        ValueError,
        r"negatives\[1\] must lie in \[0, 8\] \(keys\), got 11",
    ),
    ({"negatives": (torch.arange(5), long - 1)}, ValueError, r"negatives\[1\] must lie in \[0, 3\] \(keys\), got -1"),
    (
        {"negatives": (torch.arange(5) + 1, long)},
        ValueError,
        r"\(ptr\) must rise from 0 to the 4 entries .* got \[1, 2, 3, 4, 5\]",
    ),
    (
        {"negatives": (torch.tensor([0, 2, 1, 4, 4]), long)},
        ValueError,
        r"\(ptr\) must rise from 0 .* got \[0, 2, 1, 4, 4\]",
    ),
    ({"negatives": (torch.tensor([0, 1, 2, 3, 3]), long)}, ValueError, r"\(ptr\) must rise from 0 to the 4 entries"),
    (
        {"negatives": (torch.tensor([0, 2, 2, 2, 2]), torch.tensor([5, 5])), "z2": torch.randn(9, 6)},
        ValueError,
        r"negatives lists key 5 twice for row 0",
    ),
    (
        {"negatives": (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2]))},
        ValueError,
        r"negatives lists key 2 for row 1, the positive of row 2",
    ),
    ({"directions": "qd"}, TypeError, r"directions must be a sequence of names, got 'qd'"),
    ({"directions": ["qd", "qk"]}, ValueError, r"directions must be one of 'qd', 'qq', 'dq', 'dd', got 'qk'"),
    ({"directions": ["qq"]}, ValueError, r"directions must hold 'qd', and each name once, got \['qq'\]"),
    ({"directions": ["qd", "qd"]}, ValueError, r"directions must hold 'qd', and each name once"),
    (
        {"directions": ["qd", "dd"], "z2": torch.randn(6, 6)},
        ValueError,
        r"'dd' need N = \(K \+ 1\) B keys.* N = 6, B = 4",
    ),
    ({"partition": "each"}, ValueError, r"partition must be one of 'joint', 'per_direction', got 'each'"),
    (
        {"directions": ["qd", "qq"], "partition": "per_direction"},
        ValueError,
        r"'per_direction' needs directions with the positive .* got 'qq'",
    ),
    ({"symmetric": True, "z2": torch.randn(8, 6)}, ValueError, r"symmetric=True needs as many keys as rows.* 4 .* 8"),
    ({"symmetric": True, "positives": long}, ValueError, r"symmetric and positives exclude each other"),
    ({"symmetric": 1}, TypeError, r"symmetric must be True or False, got 1"),
    ({"normalize": None}, TypeError, r"normalize must be True or False"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
    ({"weight": long}, TypeError, r"weight must be a float tensor, got torch.int64"),
    ({"weight": 2.0}, TypeError, r"weight must be a tensor"),
    ({"reduction": "avg"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ({"backend": "gpu"}, ValueError, r"backend must be one of 'auto', .* got 'gpu'"),
]


# Something of each argument that another excludes.
GIVEN = {
    "symmetric": True,
    "positives": long,
    "hard_negative_weight": 1.0,
    "guides": [(z, z)],
    "guide_weights": [1.0],
    "guide_logits": torch.zeros(4, 4),
    "negatives": (torch.zeros(5).long(), torch.zeros(0).long()),
    "directions": ["qd", "qq"],
}


@pytest.mark.parametrize("names", EXCLUSIVE, ids="+".join)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_arguments_that_exclude_each_other(names, backend):
    with pytest.raises(ValueError, match=f"{names[0]} and {names[1]} exclude each other"):
        fused_infonce(z, z, backend=backend, **{name: GIVEN[name] for name in names})


def test_the_documentation_lists_what_excludes_each_other():
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    for names, why in EXCLUSIVE.items():
        assert f"| `{names[0]}` | `{names[1]}` | {why} |" in text


@pytest.mark.parametrize("change, error, message", BAD, ids=[str(k) + next(iter(c)) for k, (c, _, _) in enumerate(BAD)])
@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "cpu"])
def test_named_error(change, error, message, backend):
    arguments = {"z1": z, "z2": z, "backend": backend, **change}
    with pytest.raises(error, match=message):
        fused_focal_infonce(**arguments)
    if "m" not in change:
        with pytest.raises(error, match=message):
            fused_infonce(**arguments)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_autocast_does_not_hide_that_one_side_is_float64(backend):
    """It leaves float64 as it is, and kernels read both sides as one type."""
    for z1, z2 in ((z, z.double()), (z.double(), z)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="z2 must have z1's dtype"):
            fused_focal_infonce(z1, z2, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(backend):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, so this backend runs")
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot run here: .*"):
        fused_focal_infonce(z, z, backend=backend)


def test_modules_check_their_configuration_at_once():
    with pytest.raises(ValueError, match="temperature"):
        InfoNCELoss(0.0)
    with pytest.raises(ValueError, match="m must be"):
        FocalInfoNCELoss(0.05, math.nan)
    with pytest.raises(ValueError, match="reduction"):
        FocalInfoNCELoss(reduction="avg")
    with pytest.raises(TypeError, match="symetric"):
        FocalInfoNCELoss(symetric=True)


def test_one_row_works():
    one = torch.randn(1, 6, requires_grad=True)
    for backend in ("reference", "torch", "cpu"):
        loss = fused_focal_infonce(one, one.detach(), backend=backend)
        loss.backward()
        assert loss.item() == 0 and not one.grad.any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_more_than_2_to_the_31_elements_do_not_overflow(backend):
    """c N > 2^31 through a strided panel, and N D > 2^31 in the keys, without the memory: expanded and strided
    views."""
    from pycse.backends.cpu import contrastive as cpu
    from pycse.backends.torch import contrastive as plain
    from pycse.panels import contrastive as panel
    from pycse.problem import Contrastive, Needs

    kernels = {"torch": plain, "cpu": cpu}[backend].Kernels
    rows, N, stride = 3, 64, 2**30 + 16  # row 2 begins beyond 2^31 elements
    wide = torch.empty(1)
    wide.untyped_storage().resize_(4 * (2 * stride + N))  # untouched pages take no memory
    S = torch.as_strided(wide, (rows, N), (stride, 1))
    values = torch.randn(rows, N).clamp(-1, 1)
    S.copy_(values)
    compact = values.clone()
    keys = torch.randn(N, 4)
    outcome = []
    for panel_S in (S, compact):
        p = Contrastive(keys[:rows], keys, 0.05, 0.3, form="focal", needs=Needs(True, True))
        state = panel.State(r2=torch.ones(N), coef=1.0, loss=torch.empty(rows))
        kernels(p, state).rows(panel_S, 0, True)
        outcome.append((state.loss, panel_S.clone()))
    for strided, dense in zip(*outcome):
        assert torch.equal(strided, dense)


def test_options_that_are_equal_and_of_another_kind_are_checked_again():
    z = torch.eye(2)
    fused_infonce(z, z, 1.0, hardness=1.0, directions=("qd", "dq"))
    fused_infonce(z, z, 1.0, symmetric=True)
    for change, error, message in (
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"hardness": True}, TypeError, "hardness must be a number, got True"),
        ({"hardness": ([],)}, TypeError, "hardness must be a number"),
        ({"directions": (["qd"],)}, ValueError, "directions must be one of"),
    ):
        with pytest.raises(error, match=message):
            fused_infonce(z, z, 1.0, **change)


def test_a_tensor_among_the_options_is_not_kept():
    z, temperature = torch.eye(2), torch.tensor(1.0)
    bound = torch.ones(2)
    seen = weakref.ref(temperature), weakref.ref(bound)
    fused_infonce(z, z, temperature, exclude_above=bound)
    del temperature, bound
    assert seen[0]() is None and seen[1]() is None


def test_numbers_of_other_kinds():
    """NumPy's and Decimal are numbers; what is infinite in NumPy's float32 is not finite."""
    import warnings
    from decimal import Decimal

    import numpy as np

    z = torch.randn(4, 8)
    expected = fused_infonce(z, z, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (np.float64(0.05), Decimal("0.05")):
            assert torch.equal(fused_infonce(z, z, number), expected)
        torch.testing.assert_close(fused_infonce(z, z, np.float32(0.05)), expected)
        for bad in (np.float32("inf"), np.float16("nan"), Decimal("inf")):
            with pytest.raises(ValueError, match="temperature must be a finite number"):
                fused_infonce(z, z, bad)
