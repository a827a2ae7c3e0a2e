"""torch.library operators: schema, fake kernel, autograd and autocast. One boundary for each public call."""

from pycse.ops.contrastive import contrastive

__all__ = ["contrastive"]
