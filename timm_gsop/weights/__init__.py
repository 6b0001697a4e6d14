"""Where weights come from and go to: conversion of released checkpoints, neutral starts, publishing."""

from timm_gsop.pretrained.neutral_start import neutral_start
from timm_gsop.weights.convert import convert
from timm_gsop.weights.publish import publish, stage

__all__ = ["convert", "neutral_start", "publish", "stage"]
