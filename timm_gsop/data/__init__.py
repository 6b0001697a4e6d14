"""Data sets of the paper, as timm's train.py reads them."""
