"""Which pooling helps on your images: heads on a frozen backbone, compared (``python -m timm_gsop.probe``).

Needs the extra ``probe``: ``pip install "timm-gsop[probe]"``.
"""

from timm_gsop.probe.comparison import run
from timm_gsop.probe.heads import HEADS
from timm_gsop.probe.table import Row, Table

__all__ = ["HEADS", "Row", "Table", "run"]
