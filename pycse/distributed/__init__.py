"""The losses over the processes of a group: each holds its rows, and all share their keys.

A call is one conversation between the ranks (talk.py): a header says what each calls with, a payload brings the keys,
and in backward one collective takes their gradients home. What a rank then computes is the joined batch's problem, of
its own rows (joined.py). docs/scaling.md has the collectives, bytes and operations.
"""

from pycse.distributed.calls import adapacse, contrastive, distill, filled, sigmoid, supervised
from pycse.distributed.hypersphere import alignment, uniformity
from pycse.distributed.rows import averaged, differ, joined_rows
from pycse.distributed.talk import alike, refuse

__all__ = [
    "adapacse",
    "alignment",
    "alike",
    "averaged",
    "contrastive",
    "differ",
    "distill",
    "filled",
    "joined_rows",
    "refuse",
    "sigmoid",
    "supervised",
    "uniformity",
]
