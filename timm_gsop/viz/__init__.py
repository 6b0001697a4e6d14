"""Pictures: of what the blocks make of an image, and of training. They need matplotlib: pip install timm-gsop[demo].

``python -m timm_gsop.viz MODEL IMAGE OUT.png`` and ``python -m timm_gsop.viz curves RUN/summary.csv -o OUT.png``.
"""

from timm_gsop.viz.blocks import Record, draw, preprocess, record
from timm_gsop.viz.curves import draw_curves, plot_errors

__all__ = ["Record", "draw", "draw_curves", "plot_errors", "preprocess", "record"]
