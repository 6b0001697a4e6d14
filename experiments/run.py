"""Run what is left of the plan: python -m experiments.run --data DIR --timm-scripts DIR --jobs 2.

Every run is timm's unmodified train.py, in a process of its own at low priority, with a checkpoint after every epoch.
After a kill, of a run or of this command, the same command resumes each run from its last checkpoint. A run that has
finished leaves its summary.csv and its arguments in experiments/results, to be committed. One that has not leaves
nothing there. Runs that outlive this command keep a lock, so that a second command does not start them again.

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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from experiments.plan import CONFIGS, PLAN, RESULTS, Run, chosen_lr, epochs_done, load_plan, measured_beside, top1

ROOT = CONFIGS.parent
ATTEMPTS = 2  # starts without a new epoch, after which a run has failed
SPLITS = dict(train_split="train", val_split="validation")  # options, and train.py's defaults
POLL = 1.0  # seconds between looks at the processes
# glibc returns large tensors to the system and asks for them again, which costs 14 % of a training step on a CPU.
KEEP_MEMORY = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**33))


@dataclass
class Folders:
    """Where things are.

    Attributes:
        data: Images, as experiments/prepare.py writes them.
        scripts: timm's train.py.
        output: Checkpoints and logs of runs; not to be committed.
        results: What finished runs leave; to be committed.
    """

    data: Path
    scripts: Path
    output: Path
    results: Path


@dataclass
class Job:
    """A run in progress.

    Attributes:
        run: Which.
        process: train.py.
        epochs: Epochs that it had when it was started.
    """

    run: Run
    process: subprocess.Popen[bytes]
    epochs: int


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


def command(run: Run, folders: Folders, device: str) -> list[str]:
    """The command line of a run: train.py with its recipe, resumed if there is a checkpoint."""
    options = dict(run.options)
    if run.lr_from:
        options["lr"] = chosen_lr(run, folders.results)
    settings = run.settings
    weights = folders.data / f"{settings.get('model_kwargs', {}).get('backbone')}.safetensors"
    if settings.get("pretrained") and weights.exists():
        options["pretrained_path"] = weights
    group, _, experiment = run.name.partition("/")
    options |= dict(data_dir=folders.data, output=folders.output / group, experiment=experiment)
    options |= dict(seed=run.seed, epochs=run.epochs, device=device)
    checkpoint = folders.output / run.name / "last.pth.tar"
    if checkpoint.exists():
        options["resume"] = checkpoint
    recipe = CONFIGS / f"{run.recipe}.yaml"
    return [sys.executable, str(folders.scripts / "train.py"), "-c", str(recipe), *as_arguments(options)]


def start(run: Run, folders: Folders, device: str, threads: int) -> Job | None:
    """Start a run, or return None if a process that another command started is still at it."""
    folder = folders.output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        check_epochs(run, folder)
        # The process inherits the lock and keeps it until it ends, even if this command is killed.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        line = command(run, folders, device)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Safe path: beside train.py there may be timm's sources, which are not the version that is installed.
        env = {**os.environ, **KEEP_MEMORY, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(["nice", "-n", "10", *line], stdout=log, stderr=log, env=env, pass_fds=[lock])
    except BlockingIOError:
        return None
    finally:
        os.close(lock)
    return Job(run, process, epochs_done(folder / "summary.csv"))


def check_epochs(run: Run, folder: Path) -> None:
    """Complain about a folder of a run that was started with another number of epochs, and so another schedule."""
    arguments = folder / "args.yaml"
    if arguments.exists() and (epochs := yaml.safe_load(arguments.read_text())["epochs"]) != run.epochs:
        raise ValueError(f"{folder} was started for {epochs} epochs, and the plan says {run.epochs}; remove it")


def keep_results(run: Run, folders: Folders) -> None:
    """Copy what a finished run leaves to the results, its arguments without the paths of this machine."""
    folder, target = folders.output / run.name, folders.results / f"{run.name}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    arguments = yaml.safe_load((folder / "args.yaml").read_text())
    public = {key: value for key, value in arguments.items() if not (isinstance(value, str) and value.startswith("/"))}
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(yaml.safe_dump(public))
    partial.replace(target.with_suffix(".yaml"))
    shutil.copyfile(folder / "summary.csv", partial)
    partial.replace(target)  # last: it is what says that the run has finished


def has_finished(run: Run, folders: Folders) -> bool:
    """Whether a run has its results; they are copied if its last epoch is there."""
    if top1(run, folders.results) is not None:
        return True
    if epochs_done(folders.output / run.name / "summary.csv") < run.epochs:
        return False
    keep_results(run, folders)
    return True


def is_ready(run: Run, folders: Folders) -> bool:
    """Whether a run's learning rate is known."""
    return not run.lr_from or chosen_lr(run, folders.results) is not None


def end_of_search(run: Run, results: Path) -> str:
    """Say so if a run's learning rate is the lowest or the highest that was tried: a better one may lie beyond."""
    if not run.lr_from:
        return ""
    rates, best = [other.options["lr"] for other in run.lr_from], chosen_lr(run, results)
    ends = [name for name, rate in dict(lowest=min(rates), highest=max(rates)).items() if rate == best]
    return f"; lr {best:g} is the {' and '.join(ends)} of the search" if ends else ""


def seconds_left(run: Run, folders: Folders) -> float:
    """Estimate of a run's remaining time."""
    return run.seconds * (run.epochs - epochs_done(folders.output / run.name / "summary.csv"))


def status(runs: Sequence[Run], folders: Folders, jobs: int) -> str:
    """What is done, and how long the rest takes by the plan's estimates."""
    left = [run for run in runs if top1(run, folders.results) is None]
    hours = sum(seconds_left(run, folders) for run in left) / jobs / 3600
    return f"{len(runs) - len(left)} of {len(runs)} runs finished, about {hours:.1f} hours left"


def run_all(runs: Sequence[Run], folders: Folders, jobs: int, device: str, threads: int) -> list[str]:
    """Run what is left, and return the names of the runs that failed."""
    left = [run for run in runs if not has_finished(run, folders)]
    running: list[Job] = []
    fruitless: dict[str, int] = {}
    say(status(runs, folders, jobs))
    try:
        while left or running:
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                name, done = job.run.name, epochs_done(folders.output / job.run.name / "summary.csv")
                if has_finished(job.run, folders):
                    say(f"finished {name}, top-1 {top1(job.run, folders.results):.2f} %. {status(runs, folders, jobs)}")
                    continue
                fruitless[name] = 0 if done > job.epochs else fruitless.get(name, 0) + 1
                say(f"{name} ended with {job.process.returncode} after {done} of {job.run.epochs} epochs")
                if fruitless[name] < ATTEMPTS:
                    left.insert(0, job.run)
            failed = [name for name, count in fruitless.items() if count >= ATTEMPTS]
            busy = 0  # slots of runs that outlived another command
            for run in list(left):
                if len(running) + busy >= jobs:
                    break
                if has_finished(run, folders):
                    left.remove(run)
                elif any(other.name in failed for other in run.lr_from):
                    left.remove(run)
                    fruitless[run.name] = ATTEMPTS
                elif is_ready(run, folders):
                    job = start(run, folders, device, threads)
                    if job is None:
                        busy += 1
                        continue
                    say(
                        f"started {run.name} at epoch {job.epochs} of {run.epochs}, process {job.process.pid}"
                        + end_of_search(run, folders.results)
                    )
                    running.append(job)
                    left.remove(run)
            if left or running:
                time.sleep(POLL)
    finally:
        for job in running:
            job.process.terminate()
    return [name for name, count in fruitless.items() if count >= ATTEMPTS]


def say(text: str) -> None:
    """Print with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def measure(runs: Sequence[Run], folders: Folders, jobs: int, device: str, threads: int, file: Path) -> None:
    """Train every network on a subset, ``jobs`` side by side, and write seconds of an epoch of every row."""
    folders = replace(folders, output=folders.output / "measure")
    shutil.rmtree(folders.output, ignore_errors=True)
    short = dict(log_interval=1, val_interval=1, val_split="search_validation")
    networks = {network(run): run for run in reversed(runs)}
    waiting = []
    for run in networks.values():
        subset = "train_5000_0" if run.settings["batch_size"] >= 128 else "train_1000_0"  # 39 or 31 batches
        options = {**run.options, **short, "train_split": subset}
        waiting.append(replace(run, epochs=1, options=options, lr_from=()))
    waiting.reverse()
    running: list[Job] = []
    speeds: dict[str, dict[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            job = start(waiting.pop(0), folders, device, threads)
            assert job is not None  # the folder is new
            running.append(job)
        time.sleep(POLL)
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            log = folders.output / job.run.name / "log.txt"
            if job.process.returncode:
                raise RuntimeError(f"{job.run.name} ended with {job.process.returncode}, see {log}")
            speeds[network(job.run)] = speed = speed_in(log.read_text(), job.run.settings["validation_batch_size"])
            say(f"{job.run.name}: {speed}")
    found = json.loads(file.read_text()) if file.exists() else {}
    for run in runs:
        speed = speeds[network(run)]
        trained, tested = (count_images(folders.data / run.settings.get(key, name)) for key, name in SPLITS.items())
        seconds = trained / speed["train"] + tested / speed["test"] / run.settings.get("val_interval", 1)
        found[f"{run.group}/{run.row}"] = dict(speed, epoch=round(seconds, 1))
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    partial.replace(file)


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
    parser.add_argument("--data", type=Path, help="what experiments/prepare.py wrote")
    parser.add_argument("--timm-scripts", type=Path, help="folder of timm's train.py, of the installed version")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups, GROUP/ROW or GROUP/ROW-SEED")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--output", type=Path, default=ROOT / "output/experiments", help="checkpoints and logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what finished runs leave, to be committed")
    parser.add_argument("--status", action="store_true", help="only say what is left")
    parser.add_argument("--measure", action="store_true", help="measure the speed of all rows, or --only some")
    args = parser.parse_args(argv)
    try:
        runs = select(load_plan(args.plan), args.only)
    except ValueError as error:
        parser.error(str(error))
    missing = Path("missing")
    folders = Folders(
        *[path.absolute() for path in (args.data or missing, args.timm_scripts or missing, args.output, args.results)]
    )
    if args.status:
        for run in runs:
            done = epochs_done(folders.output / run.name / "summary.csv")
            accuracy = top1(run, folders.results)
            state = f"{done} of {run.epochs} epochs" if accuracy is None else f"finished, {accuracy:.2f} %"
            print(f"{run.name:40} {state:20} {run.seconds * run.epochs / 60:7.0f} min in all")
        print(status(runs, folders, args.jobs))
        return
    if not (folders.data / "train").is_dir():
        parser.error(f"--data {args.data} has no folder train; python -m experiments.prepare DIR writes it")
    if not (folders.scripts / "train.py").is_file():
        parser.error(
            f"--timm-scripts {args.timm_scripts} has no train.py; it is in timm's repository, not in its wheel"
        )
    if args.measure:
        if finished := [run.name for run in runs if top1(run, folders.results) is not None]:
            parser.error(
                f"{', '.join(finished)} finished already; measure before the first run, or --only other groups"
            )
        measure(runs, folders, args.jobs, args.device, args.threads, measured_beside(args.plan))
        return
    for run in runs:
        unknown = [other.name for other in run.lr_from if other not in runs and not has_finished(other, folders)]
        if unknown:
            parser.error(f"{run.name} needs {', '.join(unknown)}, to know its learning rate; add them to --only")
    if failed := run_all(runs, folders, args.jobs, args.device, args.threads):
        sys.exit(f"failed, see log.txt in {folders.output}: {', '.join(failed)}")


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
