"""Where kernels are tested: compiled on a GPU, else in Triton's interpreter (conftest.py). Not a test itself.

Importing it skips a test module where Triton cannot be installed.
"""

import pytest
import torch
from models import TRITON_REQUIRED

if not TRITON_REQUIRED:
    pytest.importorskip("triton")

CUDA = torch.cuda.is_available()

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="compiled here"), id="interpreted"),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")],
        id="compiled",
    ),
]
