"""torch.library operators: schema, fake kernel, autograd and autocast. One boundary for each public call."""

from pycse.ops.adapacse import loss as adapacse
from pycse.ops.contrastive import loss as contrastive
from pycse.ops.distill import losses as distill
from pycse.ops.matryoshka import losses as matryoshka
from pycse.ops.sigmoid import loss as sigmoid
from pycse.ops.supervised import loss as supervised
from pycse.ops.uniformity import alignment, uniformity

__all__ = ["adapacse", "alignment", "contrastive", "distill", "matryoshka", "sigmoid", "supervised", "uniformity"]
