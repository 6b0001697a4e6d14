"""Networks of the released code bases, by torchvision's and the tests' own formulas, with their names there.

Written from their names, shapes and order of operations (``timm_gsop/pretrained/checkpoint.py`` has the addresses).
"""

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tests.oracles import eigh_function, truncated_sqrt

RESNETS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
Weights = dict[str, torch.Tensor]


def triangle(x: torch.Tensor, num_iters: int | None) -> torch.Tensor:
    """Covariance of (B, d, H, W), its root after some iterations (-1: the exact one), the upper triangle by rows."""
    mat = torch.stack([torch.cov(sample, correction=0) for sample in x.flatten(2).double()])
    if num_iters is not None:
        exact = num_iters < 0
        mat = eigh_function(mat, lambda v: v.clamp_min(0).sqrt()) if exact else truncated_sqrt(mat, num_iters)
    size = mat.shape[1]
    return torch.stack([mat[:, i, j] for i in range(size) for j in range(i, size)], dim=1).to(x.dtype)


class CovResNet(ResNet):
    """ResNet of fast MPN-COV, GCP, DropCov in evaluation (no root), or DifferentiableSVD (the exact root)."""

    def __init__(self, depth: int, dim: int = 6, dropcov: bool = False, last_stride: int = 1, num_iters: int = 5):
        block, layers = RESNETS[depth]
        super().__init__(block, layers)
        if last_stride == 1:
            first = self.layer4[0]
            for conv in (first.conv1, first.conv2, first.downsample[0]):
                conv.stride = (1, 1)
        self.num_iters = None if dropcov else num_iters
        self.layer_reduce = nn.Conv2d(512 * block.expansion, dim, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(dim)
        self.fc = nn.Linear(dim * (dim + 1) // 2, 7)
        if dropcov:
            self.eca_layer = nn.Sequential()
            self.eca_layer.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(triangle(self.layer_reduce_bn(self.layer_reduce(x)).relu(), self.num_iters))


class CovMobileNetV2(nn.Module):
    """MobileNetV2 of GCP: ReLU6 before the covariance."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2().features
        self.dimension_reduction = nn.Sequential(nn.Conv2d(1280, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(dim * (dim + 1) // 2, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(triangle(self.dimension_reduction(self.features(x)), 5))


def of_main_py(weights: Weights, fine_tuned: bool = False) -> Weights:
    """A ResNet's weights as fast MPN-COV's training script saves them."""
    names = {"conv1": "features.module.0", "bn1": "features.module.1"}
    names |= {f"layer{i}": f"features.module.{i + 3}" for i in range(1, 5)}
    reduced = ("features.module.8", "features.module.9")
    if not fine_tuned:
        reduced = ("representation.conv_dr_block.0", "representation.conv_dr_block.1")
    names |= {"layer_reduce": reduced[0], "layer_reduce_bn": reduced[1], "fc": "classifier"}
    parts = (name.partition(".") for name in weights)
    return {f"{names[first]}.{rest}": weights[f"{first}.{rest}"] for first, _, rest in parts}


def other_networks(name: str) -> Weights:
    """Names of released networks that we have no place for."""
    if name == "shufflenet":
        network = torchvision.models.shufflenet_v2_x1_0()
        network.dimension_reduction = nn.Sequential(nn.Conv2d(1024, 6, 1, bias=False), nn.BatchNorm2d(6))
        return network.state_dict()
    with torch.device("meta"):
        network = torchvision.models.vgg16_bn()
    network.representation = nn.Sequential()
    network.representation.conv_dr_block = nn.Sequential(nn.Conv2d(512, 6, 1, bias=False), nn.BatchNorm2d(6))
    return {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}
