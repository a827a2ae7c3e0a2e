"""Every check of user input, before any work. Messages name the argument, what it was and what is allowed."""

from pycse.validation.adapacse_losses import adapacse, adapacse_options, check_adapacse
from pycse.validation.checks import (
    choice,
    detached,
    embeddings,
    fits_64_bits,
    flag,
    number,
    real,
    rows_and_choices,
    rows_and_keys,
    seed,
    whole,
)
from pycse.validation.contrastive_losses import check_lists, check_values, contrastive, contrastive_options
from pycse.validation.distillation_losses import distillation, distillation_options, distillcse_options
from pycse.validation.hypersphere import alignment, uniformity
from pycse.validation.layers import linear, linear_mask, packed_mask
from pycse.validation.matryoshka import lengths, lengths_a_step, needs_dims, one_a_length
from pycse.validation.sigmoid_losses import check_sigmoid_values, sigmoid, sigmoid_options
from pycse.validation.supervised_losses import check_supervised, supervised, supervised_options

__all__ = [
    "adapacse",
    "adapacse_options",
    "alignment",
    "check_adapacse",
    "check_lists",
    "check_supervised",
    "check_sigmoid_values",
    "check_values",
    "choice",
    "contrastive",
    "contrastive_options",
    "detached",
    "distillation",
    "distillation_options",
    "distillcse_options",
    "embeddings",
    "fits_64_bits",
    "flag",
    "lengths",
    "lengths_a_step",
    "linear",
    "linear_mask",
    "needs_dims",
    "number",
    "one_a_length",
    "packed_mask",
    "real",
    "rows_and_choices",
    "rows_and_keys",
    "seed",
    "sigmoid",
    "sigmoid_options",
    "supervised",
    "supervised_options",
    "uniformity",
    "whole",
]
