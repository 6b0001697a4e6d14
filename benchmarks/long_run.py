"""Two thousand steps of a small GSoP-Net2 under autocast, with spikes of the rate and noisy labels.

``python -m benchmarks.long_run`` prints gradient norms and memory, and writes benchmarks/results/long_run.json.
"""

import argparse
import resource
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.command_line import keep

RESULTS = Path(__file__).parent / "results/long_run.json"
SPIKE_EVERY, SPIKE = 250, 30.0
NOISY = 0.2


def run(steps: int, seed: int = 0) -> dict[str, Any]:
    """Train on random images of four kinds, a fifth of the labels wrong; every 250th step has 30 times the rate.

    Returns:
        By every tenth of the steps: mean loss, largest gradient norm, and the process's peak memory (MiB); and whether
        every loss, gradient and weight was finite.
    """
    torch.manual_seed(seed)
    model = timm.create_model(
        "gsop_resnet26_net2",
        channels=(8, 8, 16, 16),
        cov_dim=8,
        isqrt_dim=8,
        num_classes=4,
        gsop_type="avg",
        spatial_size=3,
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    kinds = torch.randn(4, 3, 32, 32)
    log: dict[str, Any] = dict(steps=steps, loss=[], grad_norm=[], memory=[], finite=True)
    losses, norms = [], []
    for step in range(1, steps + 1):
        labels = torch.randint(0, 4, (8,))
        images = kinds[labels] + torch.randn(8, 3, 32, 32)
        wrong = torch.rand(8) < NOISY
        labels = torch.where(wrong, torch.randint(0, 4, (8,)), labels)
        optimizer.param_groups[0]["lr"] = 0.02 * (SPIKE if step % SPIKE_EVERY == 0 else 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # what it was before
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        if step % (steps // 10) == 0:
            log["loss"].append(sum(losses) / len(losses))
            log["grad_norm"].append(max(norms))
            log["memory"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            losses, norms = [], []
    finite = all(value.isfinite().all() for value in model.state_dict().values())
    numbers = torch.tensor([*log["loss"], *log["grad_norm"]])
    log["finite"] = bool(finite and numbers.isfinite().all())
    return log


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    log = run(parser.parse_args().steps)
    for name in ("loss", "grad_norm", "memory"):
        print(f"{name:10}", *(f"{value:9.3f}" for value in log[name]))
    print("finite", log["finite"])
    RESULTS.parent.mkdir(exist_ok=True)
    keep(dict(log, torch=torch.__version__, command="python -m benchmarks.long_run"), RESULTS)


if __name__ == "__main__":
    main()
