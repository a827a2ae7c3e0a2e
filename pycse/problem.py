"""What one call computes: the arguments after validation, and what comes back.

The names follow kernels/README.md. A ``Contrastive`` or a ``Distillation`` is what an op hands to a backend; every
backend returns a ``Result``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycse import logits
from pycse.logits import Logit

FIXED_RANGE = 80.0  # of logits, see Contrastive.shift


class Needs(NamedTuple):
    """Which gradients to compute."""

    z1: bool = False
    z2: bool = False
    temperature: bool = False
    m: bool = False
    weight: bool = False


class Share(NamedTuple):
    """Which rows of a batch that several processes hold are this process'. Rows are numbered as in the joined batch."""

    begin: int = 0
    end: int = 0
    total: int = 0  # rows of the joined batch; 0: there is one process, and all rows are its own


class Rows:
    """What follows from one loss a row: how they are reduced. Its problems hold z1, weight and reduction.

    Where several processes share the batch (``share``), matrices have the process' own rows, or all; weight is of its
    own; other vectors have an entry for each row of the joined batch, of which those of other processes are not looked
    at.
    """

    z1: Tensor
    weight: Tensor | None
    reduction: str
    share: Share

    @property
    def B(self) -> int:
        """Rows of the batch, those of all processes."""
        return self.share.total or self.z1.shape[0]

    @property
    def mine(self) -> slice:
        """This process' rows among them."""
        return slice(self.share.begin, self.share.end) if self.share.total else slice(0, self.z1.shape[0])

    @property
    def first(self) -> int:
        """The number of z1's first row."""
        return 0 if self.z1.shape[0] == self.B else self.share.begin

    def rows_of(self, x: Tensor, i0: int, n: int) -> Tensor:
        """Rows [i0, i0 + n) of a matrix that has all rows, or this process'."""
        at = i0 if x.shape[0] == self.B else i0 - self.share.begin
        return x[at : at + n]

    def placed(self, own: Any) -> Any:
        """A vector of this process' rows as one of all; a number stays one."""
        if not isinstance(own, Tensor) or not self.share.total:
            return own
        result = own.new_zeros(self.B)
        result[self.mine] = own
        return result

    @property
    def acc(self) -> torch.dtype:
        """Accumulation type: losses, norms and row factors."""
        return torch.float64 if self.z1.dtype == torch.float64 else torch.float32

    def row_coefficients(self) -> Tensor | float:
        """dLoss/dL_i: (B,) in ``acc``, or one number for all rows."""
        if self.weight is None:
            return 1 / self.z1.shape[0] if self.reduction == "mean" else 1.0
        weight = self.weight.to(self.acc).contiguous()  # an upstream gradient may be expanded
        return weight / weight.sum() if self.reduction == "mean" else weight

    def copy(self) -> Any:
        """The same problem: what is set in the one does not show in the other."""
        result = object.__new__(type(self))
        result.__dict__ = vars(self).copy()
        return result

    def reduce(self, rows: Tensor) -> Tensor:
        """(B,) losses to what the caller asked for."""
        coef = self.row_coefficients()
        rows = rows * coef
        return rows if self.reduction == "none" else rows.sum()

    def weight_gradient(self, rows: Tensor) -> Tensor:
        """dLoss/dw_i from the rows' losses, for "mean" (quotient rule) and "sum"."""
        assert self.weight is not None
        if self.reduction == "sum":
            return rows
        total = self.weight.to(self.acc).sum()
        return (rows - self.reduce(rows)) / total


def bound(by: str, d: float | Tensor, at: Tensor) -> Tensor:
    """Above which a key is no negative, from a distance and the positive's similarity."""
    if by == "constant":
        return torch.zeros_like(at) + d
    return at + (d * at.abs() if by == "relative" else d)


class Pairs(Rows):
    """A loss over all pairs of rows and keys, which goes by row panels (pycse/panels/contrastive.py)."""

    z2: Tensor
    normalize: bool
    needs: Any  # of gradients, a named tuple
    symmetric: bool = False
    same = False  # the keys are the rows: z1 takes the gradient of both
    excludes = False  # keys by a threshold from their row's positive
    guided = False  # by similarities of another model, which a panel has beside its own: those of
    guide_queries: Tensor | None = None  # (B, D') and
    guide_keys: Tensor | None = None  # (N, D'), or
    guide_logits: Tensor | None = None  # (B, N)
    one_positive = False  # a row: its similarity may be wanted before the panel
    positives: Tensor | None = None  # (B,) which key that is; None: key i
    gradients = 0  # of the logit's numbers, row by row

    @property
    def trained(self) -> bool:
        """Whether the gradient of a number of the logit is wanted."""
        raise NotImplementedError

    def result(
        self, rows: Tensor, dz1: Tensor | None, dz2: Tensor | None, dlogit: Tensor | None, **more: Any
    ) -> Result:
        """What the backends return, given the gradients of the logit's numbers, (``gradients``, B)."""
        raise NotImplementedError


@dataclass
class Contrastive(Pairs):
    """Field by field the operator's arguments (pycse/ops): those that may require grad, other tensors, options."""

    z1: Tensor  # (B, D)
    z2: Tensor  # (N, D)
    temperature: float | Tensor
    m: float | Tensor = 0.0
    weight: Tensor | None = None  # (B,)
    positives: Tensor | None = None  # (B,) int64
    query_ids: Tensor | None = None  # (B,) int64
    key_ids: Tensor | None = None  # (N,) int64
    exclude_each: Tensor | None = None  # (B,): exclude_above row by row
    guide_queries: Tensor | None = None  # (B, D'): guides of the rows, normalised, side by side; and of the keys
    guide_keys: Tensor | None = None  # (N, D')
    guide_logits: Tensor | None = None  # (B, N): or their similarities
    negatives_ptr: Tensor | None = (
        None  # (B + 1,) int64: where each row's own negatives begin in the index, and its end
    )
    negatives_index: Tensor | None = None  # int64
    form: str = "infonce"
    positive_margin: float = 0.0
    hardness: float = 0.0
    hardness_mode: str = "all_negatives"
    hard_negative_weight: float = 0.0
    exclude_above: float | None = None
    exclude_by: str = "absolute"
    guide_above: float = 0.0
    guide_by: str = "absolute"
    symmetric: bool = False
    directions: str = "qd"  # of DIRECTIONS, in that order, with spaces between
    partition: str = "joint"
    output: str = "loss"  # of a row: its loss, the log of its sum, or of the negatives' alone
    normalize: bool = True
    reduction: str = "mean"
    share: Share = Share()
    needs: Needs = Needs()

    one_positive = True
    gradients = logits.GRADIENTS

    @property
    def trained(self) -> bool:
        return self.needs.temperature or self.needs.m

    @property
    def logit(self) -> Logit:
        return logits.logit(
            self.form, self.positive_margin, self.hardness, self.hardness_mode, self.hard_negative_weight
        )

    def coefficients(self) -> logits.Coefficients | Tensor:
        """Of the logit: numbers, or (8,) in ``acc`` where temperature or m is a tensor."""
        if isinstance(self.temperature, Tensor) or isinstance(self.m, Tensor):
            return self.logit.coefficients_on_device(self.temperature, self.m, self.z1, self.acc)
        return self.logit.coefficients(self.temperature, self.m)

    @property
    def excludes(self) -> bool:  # type: ignore[override]
        return self.exclude_above is not None or self.exclude_each is not None

    def threshold(self, s_pos: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """The similarity above which a key is no negative, from the positives' similarities of these rows."""
        d: float | Tensor
        if self.exclude_each is not None:
            d = self.exclude_each[rows].to(s_pos.dtype).reshape(s_pos.shape)
        else:
            assert self.exclude_above is not None
            d = self.exclude_above
        return bound(self.exclude_by, d, s_pos)

    @property
    def in_parts(self) -> bool:
        """Whether a row's log-sum is wanted or made of several: pycse/panels/parts.py."""
        columns = self.symmetric and self.share.total > 0  # which no process has whole
        return self.output != "loss" or self.directions != "qd" or self.negatives_ptr is not None or columns

    @property
    def guided(self) -> bool:  # type: ignore[override]
        return self.guide_queries is not None or self.guide_logits is not None

    def guide_threshold(self, t_pos: Tensor) -> Tensor:
        """The same of a guide's similarities."""
        return bound(self.guide_by, self.guide_above, t_pos)

    @property
    def shift(self) -> float | None:
        """What to subtract from every logit instead of the row's maximum, or None where only the maximum is safe.

        With unit rows the logits lie in [low, high]. While high - low <= 80, exp(l - (high - 40)) lies in
        [exp(-40), exp(40)]: neither it nor its product with a key's inverse norm leaves float's range, so no maximum is
        needed before the sum.
        """
        if not self.normalize or isinstance(self.temperature, Tensor) or isinstance(self.m, Tensor):
            return None
        low, high = self.logit.range(self.temperature, self.m)
        return high - FIXED_RANGE / 2 if high - low <= FIXED_RANGE else None

    def result(
        self, rows: Tensor, dz1: Tensor | None, dz2: Tensor | None, dlogit: Tensor | None, **more: Any
    ) -> Result:
        """The gradients of the logit's coefficients, (GRADIENTS, B), as those of temperature and m."""
        dtemperature = dm = None
        if dlogit is not None:
            dtemperature, dm = self.logit.gradients(
                dlogit, self.temperature, self.m, self.needs.temperature, self.needs.m
            )
        return Result(rows, dz1, dz2, dtemperature, dm, **more)


@dataclass
class Lengths:
    """Of how many first features a loss is computed, and the weights of these losses in their sum (Matryoshka)."""

    dims: list[int]
    dim_weights: list[float]
    temperatures: bool = False  # one a length, (K,), instead of one for all

    def problem(self, p: Contrastive, k: int) -> Contrastive:
        """That of the k-th length."""
        d, result = self.dims[k], p.copy()
        result.z1, result.z2 = p.z1[:, :d], p.z2[:, :d]
        if self.temperatures:
            result.temperature = p.temperature[k]  # type: ignore[index]
        return result


class SigmoidNeeds(NamedTuple):
    """Which gradients of a Sigmoid to compute."""

    z1: bool = False
    z2: bool = False
    scale: bool = False
    bias: bool = False
    weight: bool = False


@dataclass
class Sigmoid(Pairs):
    """The sigmoid loss of all pairs: each is one of a positive or of a negative, whatever the row's other keys."""

    z1: Tensor  # (B, D)
    z2: Tensor  # (N, D)
    scale: float | Tensor
    bias: float | Tensor
    weight: Tensor | None = None  # (B,)
    positives: Tensor | None = None  # (B,) int64
    query_ids: Tensor | None = None  # (B,) int64; with them a row's positives are the keys of its id
    key_ids: Tensor | None = None  # (N,) int64
    normalize: bool = True
    reduction: str = "mean"
    share: Share = Share()
    needs: SigmoidNeeds = SigmoidNeeds()

    gradients = 2

    @property
    def trained(self) -> bool:
        return self.needs.scale or self.needs.bias

    @property
    def one_positive(self) -> bool:  # type: ignore[override]
        return self.query_ids is None

    def numbers(self) -> tuple[float | Tensor, float | Tensor]:
        """scale and bias; of tensors, which nobody has read, 0-d in ``acc``, and NaN for a scale that is not > 0."""
        scale, bias = (x.to(self.acc) if isinstance(x, Tensor) else x for x in (self.scale, self.bias))
        if isinstance(scale, Tensor):
            scale = torch.where(scale > 0, scale, torch.nan)
        return scale, bias

    def result(
        self, rows: Tensor, dz1: Tensor | None, dz2: Tensor | None, dlogit: Tensor | None, **more: Any
    ) -> Result:
        """The gradients of scale and bias, (2, B)."""
        dscale = dbias = None
        if dlogit is not None:
            dscale = dlogit[0].sum() if self.needs.scale else None
            dbias = dlogit[1].sum() if self.needs.bias else None
        return Result(rows, dz1, dz2, dscale=dscale, dbias=dbias, **more)


def inverse(temperature: float | Tensor, acc: torch.dtype) -> float | Tensor:
    """1 / temperature; of a tensor, which nobody has read, 0-d in ``acc``, and NaN where it is not > 0."""
    if not isinstance(temperature, Tensor):
        return 1 / temperature
    return 1 / torch.where(temperature > 0, temperature.to(acc), torch.nan)


def shift_of_cosines(temperature: float) -> float | None:
    """As Contrastive.shift, of logits between -1 / temperature and 1 / temperature."""
    high = 1 / temperature
    return high - FIXED_RANGE / 2 if 2 * high <= FIXED_RANGE else None


class SupervisedNeeds(NamedTuple):
    """Which gradients of a supervised loss to compute."""

    z1: bool = False
    z2: bool = False
    temperature: bool = False
    weight: bool = False


@dataclass
class Supervised(Pairs):
    """Every key with the row's id is a positive. Field by field the operator's arguments, as those of Contrastive."""

    z1: Tensor  # (B, D)
    z2: Tensor | None  # type: ignore[assignment]  # (N, D); None: z1, until the operator puts it here
    temperature: float | Tensor
    weight: Tensor | None  # (B,)
    ids1: Tensor  # (B,) int64
    ids2: Tensor | None = None  # (N,) int64; None: the keys are the rows, and none is its own key
    inside: bool = False  # the positives' mean inside the logarithm
    normalize: bool = True
    reduction: str = "mean"
    share: Share = Share()
    needs: SupervisedNeeds = SupervisedNeeds()

    gradients = 1  # of 1 / temperature

    @property
    def trained(self) -> bool:
        return self.needs.temperature

    @property
    def same(self) -> bool:  # type: ignore[override]
        return self.ids2 is None

    @property
    def key_ids(self) -> Tensor:
        return self.ids1 if self.ids2 is None else self.ids2

    def sharpness(self) -> float | Tensor:
        """1 / temperature; of a tensor, which nobody has read, 0-d in ``acc``, and NaN where it is not > 0."""
        return inverse(self.temperature, self.acc)

    @property
    def shift(self) -> float | None:
        """As Contrastive.shift, of logits between -1 / temperature and 1 / temperature."""
        if not self.normalize or isinstance(self.temperature, Tensor):
            return None
        return shift_of_cosines(self.temperature)

    def result(
        self, rows: Tensor, dz1: Tensor | None, dz2: Tensor | None, dlogit: Tensor | None, **more: Any
    ) -> Result:
        """dlogit: dLoss/d(1 / temperature) of the rows, (1, B)."""
        return Result(rows, dz1, dz2, None if dlogit is None else -dlogit.sum() / self.temperature**2, **more)


class AngularNeeds(NamedTuple):
    """Which gradients of an Angular to compute."""

    z1: bool = False
    z2: bool = False
    temperature: bool = False
    weight: bool = False


LEAST_SINE = 2.0**-10  # of the angle of two rows, in a slope: Angular


@dataclass
class Angular(Pairs):
    """InfoNCE whose negatives are turned towards their row by an angle, more where a teacher finds them less alike.

    cos(theta - phi) has the slope cos(phi) - cot(theta) sin(phi), which has no bound at theta = pi. ``LEAST_SINE``
    stands there for a smaller sin(theta), in the slope alone: it is cos(phi) + sin(phi) / LEAST_SINE at most.
    """

    z1: Tensor  # (B, D)
    z2: Tensor  # (N, D)
    temperature: float | Tensor
    weight: Tensor | None = None  # (B,)
    positives: Tensor | None = None  # (B,) int64
    query_ids: Tensor | None = None  # (B,) int64
    key_ids: Tensor | None = None  # (N,) int64
    guide_queries: Tensor | None = None  # as Contrastive's; these or the logits are given
    guide_keys: Tensor | None = None
    guide_logits: Tensor | None = None
    m: float = 0.1  # in radians
    reduction: str = "mean"
    share: Share = Share()
    needs: AngularNeeds = AngularNeeds()

    normalize = True  # an angle needs unit rows
    guided = True
    one_positive = True
    gradients = 1  # of 1 / temperature

    @property
    def trained(self) -> bool:
        return self.needs.temperature

    def sharpness(self) -> float | Tensor:
        """As Supervised.sharpness."""
        return inverse(self.temperature, self.acc)

    @property
    def shift(self) -> float | None:
        """As Contrastive.shift, of logits between -1 / temperature and 1 / temperature."""
        return None if isinstance(self.temperature, Tensor) else shift_of_cosines(self.temperature)

    def result(
        self, rows: Tensor, dz1: Tensor | None, dz2: Tensor | None, dlogit: Tensor | None, **more: Any
    ) -> Result:
        """dlogit: dLoss/d(1 / temperature) of the rows, (1, B)."""
        return Result(rows, dz1, dz2, None if dlogit is None else -dlogit.sum() / self.temperature**2, **more)


class Grouping(NamedTuple):
    """How a teacher's row is cut into groups: by probability mass, by rank, or one span of ranks."""

    kind: str  # "mass", "size" or "span"
    value: float  # P; ranks in a group; first rank of the span
    end: int = 0  # of the span


@dataclass
class Distillation(Rows):
    """Distillation of z1's one-view similarities towards the averaged similarities of the teachers."""

    z1: Tensor  # (B, D)
    teachers: list[Tensor]  # (B, D_k) each; empty where logits are given
    teacher_weights: list[float]  # they sum to 1
    logits: Tensor | None = None  # (B, B): averaged cosines made elsewhere
    student_temperature: float = 0.025
    teacher_temperature: float = 0.0125
    group_temperature: float = 1.0
    grouping: Grouping = Grouping("mass", 0.1)
    shuffle: str = "sample"
    divergence: str = "ce"
    seed: int | Tensor = 0
    factor: float = 1.0  # of these losses in the total: scales the gradient only
    weight: Tensor | None = None
    normalize: bool = True
    reduction: str = "mean"
    share: Share = Share()
    need: bool = False  # the gradient of z1

    @property
    def cut(self) -> Grouping | None:
        """How rows are grouped, None where nothing is shuffled."""
        return None if self.shuffle == "none" else self.grouping


@dataclass
class Uniformity:
    """How evenly rows lie on the sphere: log of the mean over pairs of exp(-t |zhat_i - zhat_j|^2)."""

    z: Tensor  # (N, D)
    t: float
    others: Tensor | None = None  # rows of other processes: pairs with them count as of z's rows alone
    normalize: bool = True
    need: bool = False

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.z.dtype, torch.float32)

    @property
    def bounded(self) -> bool:
        """True where every exponent lies in [-2t, 2t] around its middle, and that in exp's range."""
        return self.normalize and 4 * self.t <= FIXED_RANGE


@dataclass
class Alignment:
    """How close the rows of pairs lie: the mean of |xhat_i - yhat_i|^2."""

    x: Tensor  # (B, D)
    y: Tensor  # (B, D)
    normalize: bool = True
    needs: tuple[bool, bool] = (False, False)


class Result(NamedTuple):
    """Row losses and the gradients of the reduced loss; None where not needed."""

    rows: Tensor
    dz1: Tensor | None = None
    dz2: Tensor | None = None
    dtemperature: Tensor | None = None
    dm: Tensor | None = None
    loss: Tensor | None = None  # the reduced loss, where the kernel has made it already
    dscale: Tensor | None = None
    dbias: Tensor | None = None
