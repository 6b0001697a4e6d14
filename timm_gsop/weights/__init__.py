"""Where weights come from: conversion of released checkpoints, and blocks that start without changing a network."""

from timm_gsop.pretrained.neutral_start import neutral_start
from timm_gsop.weights.convert import convert

__all__ = ["convert", "neutral_start"]
