"""`pytest bench/ --benchmark-only`: without a GPU kernels run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
