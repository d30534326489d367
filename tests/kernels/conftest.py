"""Kernels' tests: Triton kernels run in its interpreter where no GPU would compile them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any is imported
