"""Train GSoP-Net2 on scikit-learn's digits with timm's parts, save it in the Hub's layout, load it, classify.

python examples/quickstart.py [--epochs 5] [--output output/quickstart]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_loader, resolve_data_config
from timm.models import load_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary
from tqdm import tqdm

from timm_gsop.viz import plot_errors
from timm_gsop.viz.curves import read_summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

DATA = dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation="bilinear")


class Digits(torch.utils.data.Dataset):
    """1 437 training and 360 validation images of handwritten digits, always the same ones."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        self.images, self.targets = (split[0], split[2]) if train else (split[1], split[3])
        self.transform = None  # create_loader sets it

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray((self.images[index] * 255 / 16).astype("uint8"))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.image(index)), int(self.targets[index])


def loader(train: bool, data_config: dict) -> torch.utils.data.DataLoader:
    """Batches made by timm: slightly cropped for training, as they are for validation."""
    augmentation = dict(hflip=0.0, color_jitter=0.0, scale=(0.8, 1.0), ratio=(0.9, 1.1))
    return create_loader(
        Digits(train),
        batch_size=32,
        is_training=train,
        num_workers=0,
        use_prefetcher=False,
        device=torch.device("cpu"),
        **augmentation,
        **data_config,
    )


@torch.inference_mode()
def validate(model: torch.nn.Module, data_config: dict) -> dict[str, float]:
    """Top-1 accuracy (%) and loss over the validation images."""
    top1, loss = AverageMeter(), AverageMeter()
    for x, target in loader(train=False, data_config=data_config):
        logits = model(x)
        top1.update(accuracy(logits, target)[0].item(), len(target))
        loss.update(torch.nn.functional.cross_entropy(logits, target).item(), len(target))
    return dict(top1=top1.avg, loss=loss.avg)


def train(output: Path, epochs: int) -> None:
    """Train, keep the best epoch, save it in ``output/model``."""
    random_seed(0)
    model = timm.create_model("gsop_preresnet20_net2.untrained", num_classes=10, in_chans=1)
    data_config = resolve_data_config(DATA, model=model)
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05)
    batches = loader(train=True, data_config=data_config)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-4)
    (output / "summary.csv").unlink(missing_ok=True)
    # Everything is written to a folder that goes when this ends, however it ends; a finished model is moved out of it.
    with tempfile.TemporaryDirectory(dir=output) as tmp:
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=tmp, max_history=1)
        for epoch in range(epochs):
            scheduler.step(epoch)
            model.train()
            loss_avg = AverageMeter()
            progress = tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", unit="batch")
            for x, target in progress:
                loss = torch.nn.functional.cross_entropy(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_avg.update(loss.item(), len(target))
                progress.set_postfix(loss=f"{loss_avg.avg:.3f}")
            metrics = validate(model.eval(), data_config)
            print(f"  validation top-1 {metrics['top1']:.2f} %")
            update_summary(epoch, dict(loss=loss_avg.avg), metrics, output / "summary.csv")
            saver.save_checkpoint(epoch, metrics["top1"])
        load_checkpoint(model, str(Path(tmp) / "model_best.pth.tar"))
        labels = dict(label_names=[f"digit {i}" for i in range(10)])
        save_for_hf(model, Path(tmp) / "model", model_config=labels, data_config=data_config, safe_serialization=True)
        shutil.rmtree(output / "model", ignore_errors=True)
        (Path(tmp) / "model").rename(output / "model")
    top1 = validate(model.eval(), data_config)["top1"]
    print(f"trained: {top1:.4f} % validation top-1; saved in {output / 'model'}")
    # The rest runs in a new process, which knows the model by its folder alone.
    subprocess.run([sys.executable, __file__, "--output", output, "--expect", str(top1)], check=True)


def classify(output: Path, expected: float) -> None:
    """Load what ``train`` saved, check that it is as accurate as it was there, and draw what it sees."""
    model = timm.create_model(f"local-dir:{output / 'model'}", pretrained=True).eval()
    data_config = resolve_data_config(model=model)
    top1 = validate(model, data_config)["top1"]
    print(f"loaded in a new process: {top1:.4f} % validation top-1")
    if top1 != expected:
        sys.exit(f"the loaded model gives {top1} %, the trained one gave {expected} %")
    plot(model, data_config, output)
    print(f"wrote {output / 'quickstart.png'}")


def plot(model: torch.nn.Module, data_config: dict, output: Path) -> None:
    """Predictions for eight held-out images, and the training curve."""
    digits = loader(train=False, data_config=data_config).dataset
    with torch.inference_mode():
        confidence, predicted = model(torch.stack([digits[i][0] for i in range(8)])).softmax(1).max(1)
    figure, axes = plt.subplot_mosaic(
        [[0, 1, 2, 3, "curve", "curve"], [4, 5, 6, 7, "curve", "curve"]], figsize=(11, 4), layout="constrained"
    )
    for i in range(8):
        name = model.pretrained_cfg["label_names"][predicted[i]]
        right = predicted[i] == digits.targets[i]
        axes[i].imshow(digits.image(i), cmap="gray_r")
        axes[i].set_title(f"{name}, {100 * confidence[i]:.0f} %", color="black" if right else "crimson", fontsize=10)
        axes[i].axis("off")
    plot_errors(axes["curve"], {"gsop_preresnet20_net2 on digits": read_summary(output / "summary.csv")})
    axes["curve"].set_ylim(bottom=0)
    figure.savefig(output / "quickstart.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--expect", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a small network gains little from more, and on a busy machine they wait for each other
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        classify(args.output, args.expect) if args.expect is not None else train(args.output, args.epochs)
    except KeyboardInterrupt:
        sys.exit("interrupted")
