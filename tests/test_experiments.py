"""The plan of the experiments and the command that runs what is left of it, also after a kill."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

from experiments.plan import PLAN, PLAN_GPU, RESULTS, RESULTS_GPU, chosen_lr, epochs_done, load_plan, top1
from experiments.prepare import draw_all
from experiments.run import main, speed_in
from experiments.tables import COLUMNS, draw_time, search_table, table, timm_rows
from timm_gsop.viz.curves import read_summary

ROOT = Path(__file__).parents[1]
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
WITHOUT_COMPILER = dict(torchcompile=None, batch_size=8, validation_batch_size=10)


def make_plan(folder: Path, **groups) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(dict(groups=groups), sort_keys=False))
    return path


def group(rows, **settings) -> dict:
    return {**dict(what="A test", recipe="cifar10/preresnet20", epochs=3, seconds=1, rows=rows), **settings}


def options(plan: Path, scripts: Path, *more: str) -> list[str]:
    """The runner's arguments: folders beside its plan."""
    folder = plan.parent
    (folder / "data/train").mkdir(parents=True, exist_ok=True)
    given = dict(data=folder / "data", plan=plan, output=folder / "output", results=folder / "results")
    return [*[f"--{name}={path}" for name, path in given.items()], f"--timm-scripts={scripts}", *more]


def start(*given) -> subprocess.Popen:
    """The runner as a process."""
    line = [sys.executable, "-m", "experiments.run", *options(*given)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The runner in this process; returns what it prints."""
    monkeypatch.setattr("experiments.run.POLL", 0.05)

    def run(*given) -> str:
        main(options(*given))
        return capsys.readouterr().out

    return run


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder with something in place of train.py, which writes the same files."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "tests/stand_in_train.py", tmp_path / "scripts/train.py")
    return tmp_path / "scripts"


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_plan_has_what_was_asked_for():
    """Networks, seeds and budget; equal time in epochs of the cheaper network."""
    runs = load_plan(measured=Path("none"))
    seeds: dict[str, int] = {}
    for run in runs:
        seeds[f"{run.group}/{run.row}"] = seeds.get(f"{run.group}/{run.row}", 0) + 1
        kwargs = run.settings.get("model_kwargs", {})
        assert timm.is_model(run.settings["model"]) or run.settings["model"] == "second_order", run
        assert isinstance(kwargs, dict)
    assert all(seeds[f"scratch/{row}"] >= 3 for row in ("vanilla", "stride1", "net1", "net2"))
    assert all(seeds[f"scratch/{row}"] >= 2 for row in ("se", "isqrt", "isqrt_nodrop", "net2_nodrop"))
    assert all(seeds[f"transfer_{size}/neutral"] >= 3 for size in (1000, 5000))
    assert sum(run.seconds * run.epochs for run in runs) / 2 / 3600 < 8.5
    by_row = {(run.group, run.row): run for run in runs}
    for row in ("vanilla", "stride1"):
        for net in ("net1", "net2"):
            long, longer = by_row["scratch", f"{row}_{net}_time"], by_row["scratch", net]
            assert long.epochs * long.seconds == pytest.approx(longer.epochs * longer.seconds, rel=0.06)
            assert max(long.options["decay_milestones"]) <= long.epochs
    assert len({run.name for run in runs}) == len(runs)
    # Nothing is chosen by the test images.
    assert {run.options["val_split"] for run in runs if run.group == "transfer_search"} == {"search_validation"}


@pytest.mark.parametrize(("plan", "results"), [(PLAN, RESULTS), (PLAN_GPU, RESULTS_GPU)])
def test_what_is_committed_is_finished(plan, results):
    """Results are those of the plan, with its options, and have no path of a machine."""
    runs = {results / f"{run.name}.csv": run for run in load_plan(plan)}
    for path in results.rglob("*.csv"):
        assert top1(runs[path], results) is not None
        arguments = path.with_suffix(".yaml").read_text()
        assert not re.search(r": /", arguments)
        given, planned = yaml.safe_load(arguments), runs[path].options
        assert all((given.get(name) or None) == (value or None) for name, value in planned.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(epoch=3), "has \\['epoch'\\]; accepted"),
        (dict(rows=dict(a=dict(seed=3))), "has \\['seed'\\]; accepted"),
        (dict(recipe="cifar10/none"), "recipe='cifar10/none'"),
    ],
)
def test_bad_plans(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_plan(make_plan(tmp_path, a=group(**{"rows": dict(a={}), **settings})))


def test_subsets_are_balanced_disjoint_and_drawn_by_seed(tmp_path):
    for label in ("cat", "dog"):
        folder = tmp_path / "train" / label
        folder.mkdir(parents=True)
        for i in range(2600):
            (folder / f"{i:05}.png").touch()
    draw_all(tmp_path)

    def names(part: str) -> set[str]:
        paths = [path.relative_to(tmp_path / part) for path in (tmp_path / part).rglob("*.png")]
        assert {sum(path.parent.name == label for path in paths) for label in ("cat", "dog")} == {len(paths) // 2}
        return set(map(str, paths))

    assert len(names("train_1000_0")) == 1000
    assert len(names("train_5000_2")) == 5000
    assert names("train_1000_0") != names("train_1000_1")
    assert len(names("search_validation")) == 2000
    assert not names("search_train") & names("search_validation")


def test_killed_runs_resume_and_only_finished_ones_are_reported(stand_in, tmp_path, run_here):
    """kill -9 of a run and of the runner: it goes on after the last epoch; what survives is not started twice."""
    plan = make_plan(tmp_path, a=group(dict(one={}, two={}), epochs=8, seeds=1))
    runner = start(plan, stand_in)
    summaries = [tmp_path / f"output/a/{row}-0/summary.csv" for row in ("one", "two")]
    wait_for(lambda: all(epochs_done(summary) >= 2 for summary in summaries))
    runner.kill()
    victim = int((tmp_path / "output/a/one-0/starts.txt").read_text())
    os.kill(victim, signal.SIGKILL)
    assert not (tmp_path / "results").exists()
    output = run_here(plan, stand_in)
    assert re.search(r"started a/one-0 at epoch [2-7] of 8", output)
    assert "2 of 2 runs finished" in output
    assert (tmp_path / "output/a/one-0/starts.txt").read_text().count("\n") == 2
    assert (tmp_path / "output/a/two-0/starts.txt").read_text().count("\n") == 1  # it had outlived its runner
    for row in ("one", "two"):
        assert read_summary(tmp_path / f"results/a/{row}-0.csv")["epoch"] == list(range(8))
        arguments = yaml.safe_load((tmp_path / f"results/a/{row}-0.yaml").read_text())
        assert arguments["epochs"] == 8
        assert str(tmp_path) not in str(arguments)
    assert "started" not in run_here(plan, stand_in)


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(stand_in, tmp_path, run_here):
    rows = dict(bad=dict(options=dict(model_kwargs=dict(fail=1))), good={})
    with pytest.raises(SystemExit, match=r"failed.*: a/bad-0$"):
        run_here(make_plan(tmp_path, a=group(rows)), stand_in, "--jobs=1")
    assert [path.name for path in (tmp_path / "results/a").glob("*.csv")] == ["good-0.csv"]


def test_the_learning_rate_is_the_best_of_the_search(stand_in, tmp_path, run_here):
    """And a run waits for the whole search."""
    search = group(dict(head={}), lrs=[0.1, 0.01, 0.001], epochs=1)
    plan = make_plan(tmp_path, search=search, final=group(dict(head={}), lr_from="search", epochs=1))
    runs = load_plan(plan)
    assert chosen_lr(runs[-1], tmp_path / "results") is None
    output = run_here(plan, stand_in, "--jobs=3")
    assert output.index("started final/head-0") > output.index("finished search/head_lr0.001-0")
    assert chosen_lr(runs[-1], tmp_path / "results") == 0.01
    assert yaml.safe_load((tmp_path / "results/final/head-0.yaml").read_text())["lr"] == 0.01


@pytest.mark.parametrize(
    ("rates", "said"), [([0.01, 0.001], "highest"), ([0.1, 0.01], "lowest"), ([0.1, 0.01, 0.001], None)]
)
def test_a_rate_at_the_end_of_the_search_is_pointed_out(rates, said, stand_in, tmp_path, run_here):
    """A better one may lie beyond."""
    search = group(dict(head={}), lrs=rates, epochs=1)
    plan = make_plan(tmp_path, search=search, final=group(dict(head={}), lr_from="search", epochs=1))
    (line,) = [line for line in run_here(plan, stand_in).splitlines() if "started final/head-0" in line]
    assert line.endswith(f"; lr 0.01 is the {said} of the search") if said else "search" not in line


def test_a_run_without_its_search_is_refused(stand_in, tmp_path, run_here, capsys):
    """It would wait for ever."""
    search = group(dict(head={}), lrs=[0.1, 0.01], epochs=1)
    plan = make_plan(tmp_path, search=search, final=group(dict(head={}), lr_from="search", epochs=1))
    run_here(plan, stand_in, "--only", "search/head_lr0.1")
    with pytest.raises(SystemExit):
        run_here(plan, stand_in, "--only", "final")
    assert "final/head-0 needs search/head_lr0.01-0, to know its learning rate" in capsys.readouterr().err
    run_here(plan, stand_in, "--only", "search/head_lr0.01")
    assert "finished final/head-0" in run_here(plan, stand_in, "--only", "final")


def test_another_number_of_epochs_is_refused(stand_in, tmp_path, run_here):
    """It would be another schedule."""
    run_here(make_plan(tmp_path, a=group(dict(one={}), epochs=1)), stand_in)
    with pytest.raises(ValueError, match="was started for 1 epochs, and the plan says 2"):
        run_here(make_plan(tmp_path, a=group(dict(one={}), epochs=2)), stand_in)


def test_tables_have_what_is_finished(tmp_path):
    """Mean, standard deviation, number, spread, and differences seed by seed."""
    rows = dict(base=dict(seeds=2), net=dict(recipe="cifar10/gsop_preresnet20_net1", seconds=2, seeds=2), none={})
    runs = load_plan(make_plan(tmp_path, a=group(rows)))
    results = tmp_path / "results"
    figures = {"a/base-0": 70.0, "a/base-1": 71.0, "a/net-0": 74.5, "a/net-1": 74.0}
    (results / "a").mkdir(parents=True)
    for name, accuracy in figures.items():
        lines = [f"{epoch},{accuracy - 2 + epoch},98.5" for epoch in range(3)]
        (results / f"{name}.csv").write_text("\n".join(["epoch,eval_top1,eval_top5", *lines]) + "\n")
    (results / "a/none-0.csv").write_text("epoch,eval_top1,eval_top5\n0,99.0,100.0\n")  # one epoch of three
    speeds = {"a/base": dict(train=300.0, test=900.0), "a/net": dict(train=150.0, test=300.0)}
    *_, base, net = table(runs, ["base"], results, speeds)
    assert base.startswith("| [base](../train_configs/cifar10/preresnet20.yaml) |  | 3 | 0.219 | 1.0× | 1.0× |")
    assert net.endswith("| 2.0× | 3.0× | 74.50, 74.00 | 74.25 | 0.35 | 2 | 0.50 | +4.50, +3.00 |")
    found = timm_rows(runs, results)
    assert tuple(found[0]) == COLUMNS
    assert found[0] == dict(
        zip(
            COLUMNS,
            ("a/net-0", "32", "74.500", "25.500", "98.500", "1.500", "0.415", "1.000", "bilinear"),
            strict=True,
        )
    )
    assert len(found) == 4


def test_the_table_of_a_search_has_the_rate_that_is_chosen_in_bold(tmp_path):
    rows = dict(avg={}, isqrt=dict(lrs=[0.01, 0.03, 0.1]))
    runs = load_plan(make_plan(tmp_path, a=group(rows, epochs=1, lrs=[0.01, 0.03])))
    (tmp_path / "a").mkdir()
    for name, accuracy in {"avg_lr0.01": 70.0, "avg_lr0.03": 70.0, "isqrt_lr0.01": 60.0, "isqrt_lr0.1": 50.0}.items():
        (tmp_path / f"a/{name}-0.csv").write_text(f"epoch,eval_top1\n0,{accuracy}\n")
    head, _, avg, isqrt = search_table(runs, tmp_path)
    assert head == "| row | lr 0.01 | lr 0.03 | lr 0.1 |"
    assert avg == "| avg | 70.00 | **70.00** | – |"
    assert isqrt == "| isqrt | **60.00** | to come | 50.00 |"
    assert chosen_lr(replace(runs[0], lr_from=tuple(runs[:2])), tmp_path) == 0.03


def test_the_figure_has_a_point_for_each_row_that_was_measured(tmp_path):
    runs = load_plan(make_plan(tmp_path, a=group(dict(one={}, two={}), epochs=1)))
    (tmp_path / "a").mkdir()
    for run in runs:
        (tmp_path / f"{run.name}.csv").write_text("epoch,eval_top1\n0,70.0\n")
    figure = draw_time(runs, tmp_path, {"a/one": dict(epoch=90.0)})
    (point,) = figure.axes[0].texts
    assert (point.get_text(), *point.xy) == ("one", 1.5, 70.0)


def test_networks_of_the_plan_with_a_gpu():
    """Twice as many bottlenecks and more in the deeper ones; heads and dropout are those of their rows."""
    runs = {f"{run.group}/{run.row}": run for run in load_plan(PLAN_GPU, Path("none"))}
    assert all(run.epochs >= 60 for run in runs.values() if run.group != "scratch")
    for name, run in runs.items():
        if run.group == "scratch56_long":
            assert run.settings["model"] == runs[name.replace("56", "")].settings["model"].replace("20", "56")
            assert "options" not in run.options


def test_speed_is_read_after_the_compiler_is_done():
    line = "Train: 0 [{i:>4d}/40 (  3%)]  Loss: 2.3 (2.3)  Time: {s:.3f}s, {r:>7.2f}/s  (9.0s,   1.00/s)  LR: 0.1"
    log = [line.format(i=i, s=60.0 if i == 0 else 0.5, r=2.0 if i == 0 else 256.0) for i in range(9)]
    log += [f"Test: [{i:>4d}/19]  Time: {3.0 if i == 0 else 0.25:.3f} (0.400)  Loss: 1.0" for i in range(20)]
    assert speed_in("\n".join(log), 500) == dict(train=256.0, test=2000.0)


def test_groups_are_measured_before_their_first_run(stand_in, tmp_path, run_here, capsys):
    """And keep what was measured of other groups."""
    plan = make_plan(tmp_path, a=group(dict(one={}), epochs=1), b=group(dict(two={}), epochs=1))
    for split, count in (("train", 512), ("validation", 1000)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "data" / split / f"{i}.png").touch()
    batch = load_plan(plan)[0].settings["validation_batch_size"]
    speed = dict(train=256.0, test=4.0 * batch, epoch=round(512 / 256 + 1000 / (4 * batch), 1))
    run_here(plan, stand_in, "--measure", "--only", "a")
    run_here(plan, stand_in, "--only", "a")
    with pytest.raises(SystemExit):
        run_here(plan, stand_in, "--measure")
    assert "a/one-0 finished already" in capsys.readouterr().err
    run_here(plan, stand_in, "--measure", "--only", "b")
    assert json.loads((tmp_path / "plan.measured.json").read_text()) == {"a/one": speed, "b/two": speed}
    assert [run.seconds for run in load_plan(plan)] == [speed["epoch"]] * 2


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS is not set")
def test_timms_train_py_after_a_kill(tmp_path):
    """The real thing, killed in its first run: the results are complete, and an epoch is not there twice."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for label in range(10):
            folder = tmp_path / f"data/{split}/{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    plan = make_plan(tmp_path, a=group(dict(net=dict(options=WITHOUT_COMPILER)), epochs=4, milestones=[0.5]))
    runner = start(plan, Path(SCRIPTS), "--jobs=1")
    summary = tmp_path / "output/a/net-0/summary.csv"
    wait_for(lambda: epochs_done(summary) >= 1 and (summary.parent / "last.pth.tar").exists())
    log = "".join(runner.stdout.readline() for _ in range(2))
    os.kill(int(re.search(r"process (\d+)", log)[1]), signal.SIGKILL)  # nice becomes train.py
    rest, _ = runner.communicate(timeout=120)
    assert runner.returncode == 0
    assert "a/net-0 ended with -9" in rest
    with (tmp_path / "results/a/net-0.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["epoch"] != "epoch"][-1] == "3"
    assert read_summary(tmp_path / "results/a/net-0.csv")["epoch"] == [0, 1, 2, 3]
    assert "resume" not in yaml.safe_load((tmp_path / "results/a/net-0.yaml").read_text())
