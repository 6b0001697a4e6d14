"""Versions of PyTorch that some tests ask for."""

from functools import partial

import pytest
import torch

BEFORE_TORCH_2_6 = torch.__version__ < (2, 6)
skip_before_torch_2_6 = partial(pytest.mark.skipif, BEFORE_TORCH_2_6)
