"""For pytest: what cannot be imported here has no docstrings to run."""

from importlib.util import find_spec

# Triton comes with PyTorch on Linux only.
collect_ignore_glob = [] if find_spec("triton") else ["timm_gsop/layers/kernels/[!_]*.py"]
