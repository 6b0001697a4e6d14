"""Put a small network's weights into the package, with what they answer to stored test images; see hub/README.md."""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv, load_state_dict

from timm_gsop.pretrained.digests import SHIPPED, record_shipped

SAMPLE = Path(__file__).parents[1] / "tests/data/fashion_mnist_test.npz"


@torch.inference_mode()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="what timm's train.py wrote: out/RUN/last.pth.tar")
    parser.add_argument("name", help="the network and its tag, gsop_preresnet20_net1.fashion_mnist for one")
    parser.add_argument("--sample", type=Path, default=SAMPLE, help="test images (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to write (default: into the package)")
    args = parser.parse_args()
    cfg = timm.get_pretrained_cfg(args.name)
    model = timm.create_model(f"{args.name.partition('.')[0]}.untrained", num_classes=cfg.num_classes).eval()
    weights = load_state_dict(args.checkpoint, use_ema=False)
    stem = weights["stem.conv.weight"]
    weights["stem.conv.weight"] = adapt_input_conv(
        3, stem, base_chans=stem.shape[1]
    )  # of grey images: three equal ones
    model.load_state_dict(weights)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    images = torch.tensor(np.load(args.sample)["images"], dtype=torch.float32).div(255)[:, None]
    save_file(model.state_dict(), args.folder / f"{args.name}.safetensors")
    save_file({"logits": model((images - mean) / std)}, args.folder / f"{args.name}.golden.safetensors")
    if args.folder == SHIPPED:
        record_shipped(SHIPPED / f"{args.name}.safetensors")
    print(f"wrote {args.name}.safetensors and {args.name}.golden.safetensors into {args.folder}")


if __name__ == "__main__":
    main()
