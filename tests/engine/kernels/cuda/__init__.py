"""The CUDA path. Without a GPU its Triton kernels are interpreted, where Triton is installed."""

import os

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which any module of these tests may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
