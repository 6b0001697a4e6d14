"""Networks. Importing this registers every one of them with timm."""

from timm_gsop.models.gsop_densenet import GsopDenseNet
from timm_gsop.models.gsop_inception import GsopInceptionV3
from timm_gsop.models.gsop_preresnet import GsopPreActResNet
from timm_gsop.models.gsop_resnet import GsopResNet
from timm_gsop.models.second_order import SecondOrder

__all__ = ["GsopDenseNet", "GsopInceptionV3", "GsopPreActResNet", "GsopResNet", "SecondOrder"]
