"""pycse: fused contrastive and distillation losses for sentence embeddings.

from pycse import fused_focal_infonce
loss = fused_focal_infonce(z1, z2, temperature=0.05, m=0.3)
loss.backward()
"""

from pycse.adapacse import fused_adapacse
from pycse.distillation import fused_distill, fused_distillcse
from pycse.functional import fused_focal_infonce, fused_infonce
from pycse.hypersphere import alignment, uniformity
from pycse.log_sums import logsumexp_similarities
from pycse.matryoshka import MatryoshkaOutput
from pycse.report import info
from pycse.sigmoid import fused_sigmoid
from pycse.supervised import fused_supcon

__all__ = [
    "MatryoshkaOutput",
    "alignment",
    "fused_adapacse",
    "fused_distill",
    "fused_distillcse",
    "fused_focal_infonce",
    "fused_infonce",
    "fused_sigmoid",
    "fused_supcon",
    "info",
    "logsumexp_similarities",
    "uniformity",
]
__version__ = "0.1.0"
