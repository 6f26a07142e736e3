"""What torch's dtypes are called in C."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the kernels compute on, as `enum dtype` of step.h."""
