"""In place of timm's train.py in tests of the runner: the same files in the same order, without training."""

import argparse
import csv
import os
import time
from pathlib import Path

import yaml

parser = argparse.ArgumentParser()
parser.add_argument("-c", dest="config")
for option in ("--data-dir", "--output", "--experiment", "--device", "--resume", "--train-split", "--val-split"):
    parser.add_argument(option, default="")
parser.add_argument("--seed", type=int)
parser.add_argument("--epochs", type=int)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--model-kwargs", nargs="*", default=[])
parser.add_argument("--decay-milestones", nargs="*", type=int)
parser.add_argument("--log-interval", type=int)
parser.add_argument("--val-interval", type=int)
args = parser.parse_args()

folder = Path(args.output, args.experiment)
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.yaml").write_text(yaml.safe_dump(vars(args)))
with (folder / "starts.txt").open("a") as file:
    file.write(f"{os.getpid()}\n")
if "fail=1" in args.model_kwargs:
    raise SystemExit(3)
start = int(Path(args.resume).read_text()) + 1 if args.resume else 0
for epoch in range(start, args.epochs):
    time.sleep(0.3)
    print(f"Train: {epoch} [   0/1 (100%)]  Loss: 2.3 (2.3)  Time: 0.500s,  256.00/s  (0.500s,  256.00/s)")
    print("Test: [   0/0]  Time: 0.250 (0.250)  Loss: 1.0")
    with (folder / "summary.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        if epoch == start:
            writer.writerow(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"])
        accuracy = 50 + epoch + 10 * (args.lr == 0.01)
        writer.writerow([epoch, 1.0, 1.0, accuracy, 90.0, args.lr])
    (folder / "tmp.pth.tar").write_text(str(epoch))
    (folder / "tmp.pth.tar").rename(folder / "last.pth.tar")
