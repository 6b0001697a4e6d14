import pytest
import timm
import torch
from torch import nn

from timm_gsop import fuse_conv_bn

NARROW = dict(channels=(16, 32, 48, 64), cov_dim=8, isqrt_dim=6, num_classes=5, spatial_size=3)
# Batch normalizations that stay: no convolution is before them.
MODELS = {
    "gsop_resnet26_net1": (NARROW, 4),  # of each block, the one of the covariance
    "gsop_resnet26_net2": (dict(NARROW, gsop_type="avg"), 6),
    "gsop_resnet50_net2.untrained": (dict(NARROW, flavor="official"), 3),
    "gsop_preresnet20_net1.untrained": (dict(cov_dim=8, num_classes=5), None),
    "resnet18": (dict(num_classes=5), 0),
    "densenet121": (dict(num_classes=5), None),  # with BatchNormAct2d
}


def trained(name: str, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval().double()


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(name):
    kwargs, left = MODELS[name]
    model = trained(name, **kwargs)
    fused, x = fuse_conv_bn(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.forward_features(x), model.forward_features(x))
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (model, fused))
    assert after == left if left is not None else after < before
    assert type(fused) is type(model)


def test_leaves_the_original_as_it_is():
    model = trained("gsop_resnet26_net1", **NARROW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse_conv_bn(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_convolution_that_is_used_elsewhere_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.bn(y)

    model, x = Shared().eval(), torch.randn(2, 3, 4, 4)
    model.bn.running_mean.normal_()
    torch.testing.assert_close(fuse_conv_bn(model)(x), model(x))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="model is in training mode"):
        fuse_conv_bn(nn.Conv2d(1, 1, 1))
