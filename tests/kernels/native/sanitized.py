"""A plugin of pytest: pycse's module is the one that PYCSE_SANITIZED names."""

import importlib.util
import os
import sys

import torch  # noqa: F401  the module shares torch's OpenMP runtime

from pycse import kernels

spec = importlib.util.spec_from_file_location("pycse.kernels._native", os.environ["PYCSE_SANITIZED"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kernels._native = sys.modules["pycse.kernels._native"] = module  # type: ignore[attr-defined]
