"""Networks. Importing this registers every one of them with timm."""

from timm_gsop.models.gsop_preresnet import GsopPreActResNet
from timm_gsop.models.gsop_resnet import GsopResNet

__all__ = ["GsopPreActResNet", "GsopResNet"]
