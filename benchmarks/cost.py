"""Parameters and multiply-accumulates of every registered network, as a Markdown table: python -m benchmarks.cost.

Beside them stand the errors that the paper reports (Tables 4 to 6) for the networks that it trained.
"""

from typing import NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_gsop.models  # noqa: F401

# Top-1 and top-5 error in %, reported by the paper.
REPORTED_ERROR = {
    "gsop_resnet26_net1": "17.42 / 4.53 (ImageNet-250)",
    "gsop_resnet26_net2": "16.68 / 4.36 (ImageNet-250)",
    "isqrt_resnet26": "17.43 / 4.71 (ImageNet-250)",
    "gsop_resnet50_net1": "22.32 / 6.02 (ImageNet-1K)",
    "gsop_resnet50_net2": "21.19 / 5.64 (ImageNet-1K)",
    "isqrt_resnet50": "22.14 / 6.22 (ImageNet-1K)",
    "mpncov_resnet50": "22.74 / 6.54 (ImageNet-1K)",
    "preresnet164": "24.33 (CIFAR-100)",
    "gsop_preresnet164_net1": "20.86 (CIFAR-100)",
    "gsop_preresnet164_net2": "18.58 (CIFAR-100)",
}


class Cost(NamedTuple):
    """Parameters, and multiply-accumulates of one image at the network's own size."""

    params: int
    macs: int


def measure(model_name: str, **kwargs: object) -> Cost:
    """Count with PyTorch's ``FlopCounterMode`` (two operations a multiply-accumulate), on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(model_name, **kwargs).eval()
        image = torch.randn(1, *model.pretrained_cfg["input_size"])
        with FlopCounterMode(display=False) as counter:
            model(image)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def main() -> None:
    """Print the table."""
    print("| model | image | parameters (M) | GMACs | error % (top-1 / top-5), reported by the paper |")
    print("|---|---|---|---|---|")
    for name in timm.list_models(module=["gsop_resnet", "gsop_preresnet"]):
        size = timm.get_pretrained_cfg_value(name, "input_size")[-1]
        cost, error = measure(name), REPORTED_ERROR.get(name, "")
        print(f"| `{name}` | {size} | {cost.params / 1e6:.2f} | {cost.macs / 1e9:.2f} | {error} |")


if __name__ == "__main__":
    main()
