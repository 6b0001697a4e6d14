"""Run what is left of a plan: python -m experiments.run --data DIR --timm-scripts DIR --jobs 2.

Every run is timm's unmodified train.py, in a process of its own at low priority, with a checkpoint after every epoch.
After a kill, of a run or of this command, the same command resumes each run from its last checkpoint. The epochs of a
run that has finished go into the plan's .runs.csv, to be committed. One that has not leaves nothing there.

``--status`` says what is left. ``--measure`` trains every network on a subset and writes plan.measured.json, from
which the estimates and the epochs of the rows of equal time are computed. Measure before the first run, never after it.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from experiments.plan import (
    CONFIGS,
    PLAN,
    Run,
    chosen_lr,
    epochs_done,
    keep_run,
    load_plan,
    measured_beside,
    read_runs,
    runs_beside,
    top1,
)
from timm_gsop.complete_file import replacing

ROOT = CONFIGS.parent
SPLITS = dict(train_split="train", val_split="validation")  # options, and train.py's defaults
# glibc returns large tensors to the system and asks for them again, which costs 14 % of a training step on a CPU.
KEEP_MEMORY = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**33))


@dataclass
class Setup:
    """How and where runs are made.

    Attributes:
        data: Images, as experiments/prepare.py writes them.
        scripts: timm's train.py.
        output: Checkpoints and logs of runs; not to be committed.
        results: The file of the finished runs; to be committed.
        jobs: Runs side by side.
        threads: Threads of each.
        device: In place of the plan's; None for the plan's, or the CPU.
    """

    data: Path
    scripts: Path
    output: Path
    results: Path
    jobs: int
    threads: int
    device: str | None


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of a command line of timm."""
    line: list[str] = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            line += [option, *[f"{key}={item}" for key, item in value.items()]]
        elif isinstance(value, list):
            line += [option, *map(str, value)]
        elif value is True:
            line.append(option)
        else:
            line += [option, "" if value is None else str(value)]
    return line


def command(run: Run, setup: Setup) -> list[str]:
    """The command line of a run: train.py with its recipe, resumed if there is a checkpoint."""
    options = {"device": "cpu", **run.options}
    if setup.device:
        options["device"] = setup.device
    if run.lr_from:
        options["lr"] = chosen_lr(run, read_runs(setup.results))
    settings = run.settings
    weights = setup.data / f"{settings.get('model_kwargs', {}).get('backbone')}.safetensors"
    if settings.get("pretrained") and weights.exists():
        options["pretrained_path"] = weights
    group, _, experiment = run.name.partition("/")
    options |= dict(data_dir=setup.data, output=setup.output / group, experiment=experiment)
    options |= dict(seed=run.seed, epochs=run.epochs)
    checkpoint = setup.output / run.name / "last.pth.tar"
    if checkpoint.exists():
        options["resume"] = checkpoint
    recipe = CONFIGS / f"{run.recipe}.yaml"
    return [sys.executable, str(setup.scripts / "train.py"), "-c", str(recipe), *as_arguments(options)]


def train(run: Run, setup: Setup, lock: int) -> int:
    """Run train.py, and return its exit status. Its process inherits the lock, and keeps it if it outlives this one."""
    folder = setup.output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Safe path: beside train.py there may be timm's sources, which are not the version that is installed.
    env = {**os.environ, **KEEP_MEMORY, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    env["OMP_NUM_THREADS"] = str(setup.threads)
    with (folder / "log.txt").open("ab") as log:
        line = ["nice", "-n", "10", *command(run, setup)]
        return subprocess.run(line, stdout=log, stderr=log, env=env, pass_fds=[lock], check=False).returncode


def check_epochs(run: Run, folder: Path) -> None:
    """Complain about a folder of a run that was started with another number of epochs, and so another schedule."""
    arguments = folder / "args.yaml"
    if arguments.exists() and (epochs := yaml.safe_load(arguments.read_text())["epochs"]) != run.epochs:
        raise ValueError(f"{folder} was started for {epochs} epochs, and the plan says {run.epochs}; remove it")


def commit() -> str:
    """The commit of this checkout, with "-dirty" if it has been changed; nothing outside of git."""
    line = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def status(runs: Sequence[Run], setup: Setup) -> str:
    """What is done, and how long the rest takes by the plan's estimates."""
    results = read_runs(setup.results)
    left = [run for run in runs if top1(run, results) is None]
    seconds = sum(run.seconds * (run.epochs - epochs_done(setup.output / run.name / "summary.csv")) for run in left)
    hours = seconds / setup.jobs / 3600
    return f"{len(runs) - len(left)} of {len(runs)} runs finished, about {hours:.1f} hours left"


def run_all(runs: Sequence[Run], setup: Setup, lock: int) -> list[str]:
    """Run what is left, and return the names of the runs that failed."""
    results, code = read_runs(setup.results), commit()
    left = [run for run in runs if top1(run, results) is None]
    for run in left:
        check_epochs(run, setup.output / run.name)
    say(status(runs, setup))
    writing = threading.Lock()
    futures: dict[str, Future[bool]] = {}

    def finish(run: Run) -> bool:
        # What it waits for comes before it in the plan: it is done, or at work in another thread.
        if not all(futures[other.name].result() for other in run.lr_from if other.name in futures):
            return False
        summary = setup.output / run.name / "summary.csv"
        if (done := epochs_done(summary)) < run.epochs:
            say(f"started {run.name} at epoch {done} of {run.epochs}")
            ended = train(run, setup, lock)
            if (done := epochs_done(summary)) < run.epochs:
                say(f"{run.name} ended with {ended} after {done} of {run.epochs} epochs")
                return False
        with writing:
            keep_run(run, summary, code, setup.results)
        accuracy = top1(run, read_runs(setup.results))
        say(f"finished {run.name}, top-1 {accuracy:.2f} %. {status(runs, setup)}")
        return True

    with ThreadPoolExecutor(setup.jobs) as pool:
        try:
            for run in left:
                futures[run.name] = pool.submit(finish, run)
            return [name for name, future in futures.items() if not future.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def say(text: str) -> None:
    """Print with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def measure(runs: Sequence[Run], setup: Setup, lock: int, file: Path) -> None:
    """Train every network on a subset, ``jobs`` side by side, and write seconds of an epoch of every row."""
    setup = replace(setup, output=setup.output / "measure")
    shutil.rmtree(setup.output, ignore_errors=True)
    networks = {network(run): run for run in reversed(runs)}

    def speed_of(run: Run) -> dict[str, float]:
        subset = "train_5000_0" if run.settings["batch_size"] >= 128 else "train_1000_0"  # 39 or 31 batches
        short = dict(log_interval=1, val_interval=1, val_split="search_validation", train_split=subset)
        log = setup.output / run.name / "log.txt"
        if ended := train(replace(run, epochs=1, options={**run.options, **short}, lr_from=()), setup, lock):
            raise RuntimeError(f"{run.name} ended with {ended}, see {log}")
        speed = speed_in(log.read_text(), run.settings["validation_batch_size"])
        say(f"{run.name}: {speed}")
        return speed

    with ThreadPoolExecutor(setup.jobs) as pool:
        speeds = dict(zip(networks, pool.map(speed_of, networks.values()), strict=True))
    found = json.loads(file.read_text()) if file.exists() else {}
    for run in runs:
        speed = speeds[network(run)]
        trained, tested = (count_images(setup.data / run.settings.get(key, name)) for key, name in SPLITS.items())
        seconds = trained / speed["train"] + tested / speed["test"] / run.settings.get("val_interval", 1)
        found[f"{run.group}/{run.row}"] = dict(speed, epoch=round(seconds, 1))
    with replacing(file) as partial:
        partial.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def network(run: Run) -> str:
    """What decides on a run's speed: its settings but for seed, data and schedule."""
    other = ("epochs", "decay_milestones", "lr", "val_interval", "log_interval", *SPLITS)
    return json.dumps({key: value for key, value in run.settings.items() if key not in other}, sort_keys=True)


def count_images(folder: Path) -> int:
    """How many images a folder has."""
    return sum(1 for _ in folder.rglob("*.png"))


def speed_in(log: str, test_batch: int) -> dict[str, float]:
    """Images a second in training and in test, in train.py's log: medians of the later half, after the compiler."""
    train = [float(rate) for rate in re.findall(r"Train: .*?Time: [\d.]+s, +([\d.]+)/s", log)]
    test = [test_batch / float(seconds) for seconds in re.findall(r"Test: .*?Time: ([\d.]+)", log)]
    return {name: round(median(each[len(each) // 2 :]), 1) for name, each in dict(train=train, test=test).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    missing = Path("missing")
    parser.add_argument("--data", type=Path, default=missing, help="what experiments/prepare.py wrote")
    parser.add_argument(
        "--timm-scripts", type=Path, default=missing, help="folder of timm's train.py, of the installed version"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", help="in place of the plan's")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups, GROUP/ROW or GROUP/ROW-SEED")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--output", type=Path, default=ROOT / "output/experiments", help="checkpoints and logs")
    parser.add_argument("--results", type=Path, help="the file of the finished runs, beside the plan by default")
    parser.add_argument("--status", action="store_true", help="only say what is left")
    parser.add_argument("--measure", action="store_true", help="measure the speed of all rows, or --only some")
    args = parser.parse_args(argv)
    try:
        runs = select(load_plan(args.plan), args.only)
    except ValueError as error:
        parser.error(str(error))
    paths = (args.data, args.timm_scripts, args.output, args.results or runs_beside(args.plan))
    setup = Setup(*[path.absolute() for path in paths], args.jobs, args.threads, args.device)
    results = read_runs(setup.results)
    finished = [run.name for run in runs if top1(run, results) is not None]
    if args.status:
        for run in runs:
            done = epochs_done(setup.output / run.name / "summary.csv")
            accuracy = top1(run, results)
            state = f"{done} of {run.epochs} epochs" if accuracy is None else f"finished, {accuracy:.2f} %"
            print(f"{run.name:40} {state:20} {run.seconds * run.epochs / 60:7.0f} min in all")
        print(status(runs, setup))
        return
    if not setup.data.is_dir():
        parser.error(f"--data {args.data} is not a folder; python -m experiments.prepare DIR writes it")
    if not (setup.scripts / "train.py").is_file():
        parser.error(
            f"--timm-scripts {args.timm_scripts} has no train.py; it is in timm's repository, not in its wheel"
        )
    if args.measure and finished:
        parser.error(f"{', '.join(finished)} finished already; measure before the first run, or --only other groups")
    for run in runs:
        unknown = [other.name for other in run.lr_from if other not in runs and top1(other, results) is None]
        if unknown:
            parser.error(f"{run.name} needs {', '.join(unknown)}, to know its learning rate; add them to --only")
    setup.output.mkdir(parents=True, exist_ok=True)
    with (setup.output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another such command, or a run that outlived it, is at work in --output {args.output}")
        if args.measure:
            measure(runs, setup, lock.fileno(), measured_beside(args.plan))
        elif failed := run_all(runs, setup, lock.fileno()):
            sys.exit(f"failed, see log.txt in {setup.output}: {', '.join(failed)}")


def select(runs: list[Run], names: Sequence[str] | None) -> list[Run]:
    """Runs of groups, rows or names.

    Raises:
        ValueError: If nothing has a name.
    """
    if names is None:
        return runs
    if unknown := [name for name in names if not any(name in labels(run) for run in runs)]:
        raise ValueError(f"--only {' '.join(unknown)} is not in the plan; accepted: {sorted({r.group for r in runs})}")
    return [run for run in runs if set(labels(run)) & set(names)]


def labels(run: Run) -> tuple[str, str, str]:
    """What a run can be called by."""
    return run.group, f"{run.group}/{run.row}", run.name


if __name__ == "__main__":
    main()
