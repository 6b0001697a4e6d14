"""Put a small network's weights into the package, with what they answer to stored images; see hub/README.md."""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import adapt_input_conv, load_state_dict

from timm_gsop.pretrained.digests import SHIPPED, record_shipped

ROOT = Path(__file__).parents[1]
SAMPLES = {
    "fashion_mnist": ROOT / "tests/data/fashion_mnist_test.npz",  # its first 500 test images
    "cifar10": ROOT / "docs/figures/cat.png",  # none of its images are kept here
}


def read_sample(path: Path, size: int) -> torch.Tensor:
    """Images to answer, (B, 3, size, size), between 0 and 1: those of an archive, or the tiles of a picture."""
    if path.suffix == ".npz":
        return torch.tensor(np.load(path)["images"], dtype=torch.float32).div(255)[:, None].expand(-1, 3, -1, -1)
    picture = torch.tensor(np.asarray(Image.open(path).convert("RGB")), dtype=torch.float32).div(255).permute(2, 0, 1)
    tiles = picture.unfold(1, size, size).unfold(2, size, size)  # (3, rows, columns, size, size)
    return tiles.flatten(1, 2).transpose(0, 1)


@torch.inference_mode()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="what timm's train.py wrote: out/RUN/last.pth.tar")
    parser.add_argument("name", help="the network and its tag, gsop_preresnet20_net1.cifar10 for one")
    parser.add_argument("--sample", type=Path, help="images to answer (default: those of the tag's data)")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to write (default: into the package)")
    args = parser.parse_args()
    model_name, _, tag = args.name.partition(".")
    sample = args.sample or SAMPLES.get(tag)
    if sample is None:
        parser.error(f"there are no stored images for the tag {tag!r} (those of {sorted(SAMPLES)} have some): --sample")
    cfg = timm.get_pretrained_cfg(args.name)
    model = timm.create_model(f"{model_name}.untrained", num_classes=cfg.num_classes).eval()
    weights = load_state_dict(args.checkpoint, use_ema=False)
    stem = weights["stem.conv.weight"]
    weights["stem.conv.weight"] = adapt_input_conv(
        3, stem, base_chans=stem.shape[1]
    )  # of grey images: three equal ones
    model.load_state_dict(weights)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    images = read_sample(sample, cfg.input_size[-1])
    save_file(model.state_dict(), args.folder / f"{args.name}.safetensors")
    save_file({"logits": model((images - mean) / std)}, args.folder / f"{args.name}.golden.safetensors")
    if args.folder == SHIPPED:
        record_shipped(SHIPPED / f"{args.name}.safetensors")
    print(f"wrote {args.name}.safetensors and {args.name}.golden.safetensors into {args.folder}")


if __name__ == "__main__":
    main()
