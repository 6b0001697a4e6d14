"""Int8 in place of float32, after training: python examples/quantize_int8.py DATA_DIR [--model NAME].

PyTorch's export flow with torchao's quantizer for x86. Ranges are taken from 256 training images of Fashion-MNIST;
DATA_DIR is what torchvision's ``FashionMNIST`` reads. Needs ``pip install torchao``.
"""

import argparse

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from torchvision import datasets


def quantize(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Quantize weights and activations of a network in evaluation mode, by the ranges that ``images`` give.

    Convolutions and linear layers become int8. Covariances, square roots, and what is no convolution, stay float32.
    """
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(images)
    return convert_pt2e(prepared)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Top-1, in percent."""
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return 100 * right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--model", default="gsop_preresnet20_net1.fashion_mnist")
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

    def load(train: bool) -> datasets.FashionMNIST:
        return datasets.FashionMNIST(args.data_dir, train, lambda image: transform(image.convert("RGB")))

    images, _ = next(iter(DataLoader(Subset(load(train=True), range(256)), batch_size=256)))
    with torch.no_grad():
        quantized = quantize(model, images)
    test = DataLoader(load(train=False), batch_size=256)
    print(f"{args.model}: float32 {accuracy(model, test):.2f} %, int8 {accuracy(quantized, test):.2f} %")


if __name__ == "__main__":
    main()
