"""Registers timm-gsop's models whenever timm is imported, with no import by the user.

PyTorch calls every entry point of the group ``torch.backends`` at the end of ``import torch``; ours is
:func:`register_when_timm_is_imported`. This file stands beside the package and not in it, because importing anything
from the package runs the package's ``__init__``: from here neither its cost nor a fault in it can reach
``import torch``.
"""

import importlib
import os
import sys
import warnings
from types import ModuleType

__all__ = ["register_when_timm_is_imported"]


def register_when_timm_is_imported() -> None:
    """Arrange for ``timm_gsop.models`` to be imported as soon as ``timm.models`` has been.

    ``TIMM_GSOP_AUTOLOAD=0`` in the environment turns this off. Never raises: whatever goes wrong becomes a warning.
    """
    if os.environ.get("TIMM_GSOP_AUTOLOAD", "1") == "0":
        return
    try:
        from wrapt import register_post_import_hook

        register_post_import_hook(_register_models, "timm.models")
    except Exception as error:
        _warn(error)


def _register_models(timm_models: ModuleType) -> None:
    try:
        importlib.import_module("timm_gsop.models")
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    message = (
        f"timm-gsop could not register its models with timm: {type(error).__name__}: {error}. "
        "Reinstall timm-gsop, or set TIMM_GSOP_AUTOLOAD=0 to silence this."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings may be errors here (python -W error), and import torch must not fail for ours
        print(f"RuntimeWarning: {message}", file=sys.stderr)
