"""pycse's losses as sentence-transformers' trainer takes them.

from pycse.sentence_transformers import FocalInfoNCELoss
loss = FocalInfoNCELoss(model, temperature=0.05, m=0.3)
SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
"""

try:
    import sentence_transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pycse.sentence_transformers needs sentence-transformers >= 6: pip install 'pycse-kernels[train]'"
    ) from error

from pycse.sentence_transformers.batches import same_dataset_batches
from pycse.sentence_transformers.cached import CachedDistillCSELoss, CachedFocalInfoNCELoss, CachedInfoNCELoss
from pycse.sentence_transformers.cached_teacher import CachedTeacher
from pycse.sentence_transformers.columns import ColumnLoss
from pycse.sentence_transformers.distillation import DistillCSELoss, TextCollator
from pycse.sentence_transformers.losses import (
    FocalInfoNCELoss,
    GuidedInfoNCELoss,
    InfoNCELoss,
    MatryoshkaInfoNCELoss,
    SupConLoss,
)
from pycse.sentence_transformers.state import LossState

__all__ = [
    "CachedDistillCSELoss",
    "CachedFocalInfoNCELoss",
    "CachedInfoNCELoss",
    "CachedTeacher",
    "ColumnLoss",
    "DistillCSELoss",
    "FocalInfoNCELoss",
    "GuidedInfoNCELoss",
    "InfoNCELoss",
    "LossState",
    "MatryoshkaInfoNCELoss",
    "SupConLoss",
    "TextCollator",
    "same_dataset_batches",
]
