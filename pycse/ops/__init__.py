"""torch.library operators: schema, fake kernel, autograd and autocast. One boundary for each public call."""

from pycse.ops.contrastive import loss as contrastive_loss
from pycse.ops.distill import distill as distill_losses
from pycse.ops.uniformity import alignment, uniformity

__all__ = ["alignment", "contrastive_loss", "distill_losses", "uniformity"]
