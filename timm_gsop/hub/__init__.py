"""Where weights come from and go to: conversion of released checkpoints, neutral starts, publishing."""

from timm_gsop.hub.conversion import convert
from timm_gsop.hub.publishing import publish, stage
from timm_gsop.pretrained.neutral import neutral_start

__all__ = ["convert", "neutral_start", "publish", "stage"]
