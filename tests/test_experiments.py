"""The plan of the experiments and the command that runs what is left of it, also after a kill."""

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

import pytest
import timm
import yaml
from PIL import Image

from experiments.plan import (
    PLAN,
    PLAN_FASHION_MNIST,
    PLAN_GPU,
    chosen_lr,
    epochs_done,
    keep_run,
    load_plan,
    read_runs,
    runs_beside,
    top1,
)
from experiments.prepare import draw_all
from experiments.run import main, speed_in
from experiments.tables import COLUMNS, draw_time, search_table, table, timm_rows
from timm_gsop.viz.curves import read_summary

ROOT = Path(__file__).parents[1]
SCRIPTS = os.environ.get("TIMM_SCRIPTS")


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
    given = dict(data=folder / "data", plan=plan, output=folder / "output")
    return [*[f"--{name}={path}" for name, path in given.items()], f"--timm-scripts={scripts}", *more]


def start(*given) -> subprocess.Popen:
    """The runner as a process."""
    line = [sys.executable, "-m", "experiments.run", *options(*given)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def run_here(capsys):
    """The runner in this process; returns what it prints."""

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


def is_alive(pid: int) -> bool:
    """Whether there is such a process; a zombie, which nobody waits for, is not one."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_rows_of_equal_time_have_as_many_epochs_as_fit(tmp_path):
    """By what was measured, else by the plan's estimates; the rate falls at the same parts of the epochs."""
    rows = dict(net=dict(seconds=3), long=dict(same_time_as="net"))
    plan = make_plan(tmp_path, a=group(rows, epochs=10, milestones=[0.5]))
    assert [run.epochs for run in load_plan(plan)] == [10, 30]
    (tmp_path / "plan.measured.json").write_text(json.dumps({"a/net": dict(epoch=4.0), "a/long": dict(epoch=2.0)}))
    assert [run.epochs for run in load_plan(plan)] == [10, 20]
    assert [run.options["decay_milestones"] for run in load_plan(plan)] == [[6], [11]]


@pytest.mark.parametrize("plan", [PLAN, PLAN_GPU, PLAN_FASHION_MNIST], ids=lambda path: path.stem)
def test_what_is_committed_is_of_the_plan_and_finished(plan):
    runs, results = {run.name: run for run in load_plan(plan)}, read_runs(runs_beside(plan))
    assert results
    for name in results:
        assert top1(runs[name], results) is not None
        assert timm.is_model(runs[name].settings["model"])


def test_a_run_is_kept_to_the_last_digit(tmp_path):
    """Also one that was resumed, of which train.py repeats the header and an epoch."""
    (run,) = load_plan(make_plan(tmp_path, a=group(dict(one={}), epochs=2)))
    lines = ["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr", "0,1.25,1.5,50.340000009536745,90.0,0.1"]
    (tmp_path / "summary.csv").write_text("\n".join([*lines, lines[0], "1,1.0,1.25,60.5,91.0,0.1"]) + "\n")
    keep_run(run, tmp_path / "summary.csv", "abc", tmp_path / "plan.runs.csv")
    keep_run(replace(run, seed=1), tmp_path / "summary.csv", "abc", tmp_path / "plan.runs.csv")
    head, first, *rest = (tmp_path / "plan.runs.csv").read_text().splitlines()
    assert head == "run,seed,commit,resumed,epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
    assert first == "a/one,0,abc,1,0,1.25,1.5,50.340000009536745,90.0,0.1"
    assert len(rest) == 3
    kept = read_runs(tmp_path / "plan.runs.csv")
    assert kept["a/one-0"] == kept["a/one-1"] == read_summary(tmp_path / "summary.csv")


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


def test_killed_runs_resume_and_only_finished_ones_are_kept(stand_in, tmp_path, run_here, capsys):
    """kill -9 of a run and of the runner: what survives is not started twice; the rest goes on after its last epoch."""
    plan = make_plan(tmp_path, a=group(dict(one={}, two={}), epochs=6))
    runner = start(plan, stand_in)
    summaries = [tmp_path / f"output/a/{row}-0/summary.csv" for row in ("one", "two")]
    wait_for(lambda: all(epochs_done(summary) >= 2 for summary in summaries))
    runner.kill()
    victim, survivor = (int((summary.parent / "starts.txt").read_text()) for summary in summaries)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(SystemExit):
        run_here(plan, stand_in)
    assert "a run that outlived it, is at work" in capsys.readouterr().err
    assert not runs_beside(plan).exists()
    wait_for(lambda: epochs_done(summaries[1]) == 6 and not is_alive(survivor))
    output = run_here(plan, stand_in)
    assert re.search(r"started a/one-0 at epoch [2-5] of 6", output)
    assert "2 of 2 runs finished" in output
    assert [(summary.parent / "starts.txt").read_text().count("\n") for summary in summaries] == [2, 1]
    kept = read_runs(runs_beside(plan))
    assert [kept[name]["epoch"] for name in ("a/one-0", "a/two-0")] == [list(range(6))] * 2
    assert "started" not in run_here(plan, stand_in)


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(stand_in, tmp_path, run_here):
    rows = dict(bad=dict(options=dict(model_kwargs=dict(fail=1))), good={})
    with pytest.raises(SystemExit, match=r"failed.*: a/bad-0$"):
        run_here(make_plan(tmp_path, a=group(rows)), stand_in, "--jobs=1")
    assert list(read_runs(tmp_path / "plan.runs.csv")) == ["a/good-0"]


def test_the_learning_rate_is_the_best_of_the_search(stand_in, tmp_path, run_here):
    """And a run waits for the whole search."""
    search = group(dict(head={}), lrs=[0.1, 0.01, 0.001], epochs=1)
    plan = make_plan(tmp_path, search=search, final=group(dict(head={}), lr_from="search", epochs=1))
    runs = load_plan(plan)
    assert chosen_lr(runs[-1], {}) is None
    output = run_here(plan, stand_in, "--jobs=3")
    assert output.index("started final/head-0") > output.index("finished search/head_lr0.001-0")
    results = read_runs(runs_beside(plan))
    assert chosen_lr(runs[-1], results) == results["final/head-0"]["lr"][-1] == 0.01


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
    figures = {"a/base-0": 70.0, "a/base-1": 71.0, "a/net-0": 74.5, "a/net-1": 74.0}
    results = {
        name: dict(epoch=[0.0, 1.0, 2.0], eval_top1=[50.0, 60.0, top], eval_top5=[98.5] * 3)
        for name, top in figures.items()
    }
    results["a/none-0"] = dict(epoch=[0.0], eval_top1=[99.0], eval_top5=[100.0])  # one epoch of three
    speeds = {"a/base": dict(train=300.0, test=900.0), "a/net": dict(train=150.0, test=300.0)}
    *_, base, net = table(runs, results, ["base"], speeds)
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
    found = {"avg_lr0.01": 70.0, "avg_lr0.03": 70.0, "isqrt_lr0.01": 60.0, "isqrt_lr0.1": 50.0}
    results = {f"a/{name}-0": dict(epoch=[0.0], eval_top1=[accuracy]) for name, accuracy in found.items()}
    head, _, avg, isqrt = search_table(runs, results)
    assert head == "| row | lr 0.01 | lr 0.03 | lr 0.1 |"
    assert avg == "| avg | 70.00 | **70.00** | – |"
    assert isqrt == "| isqrt | **60.00** | to come | 50.00 |"
    assert chosen_lr(replace(runs[0], lr_from=tuple(runs[:2])), results) == 0.03


def test_the_figure_has_a_point_for_each_row_that_was_measured(tmp_path):
    runs = load_plan(make_plan(tmp_path, a=group(dict(one={}, two={}), epochs=1)))
    results = {run.name: dict(epoch=[0.0], eval_top1=[70.0]) for run in runs}
    figure = draw_time(runs, results, {"a/one": dict(epoch=90.0)})
    (point,) = figure.axes[0].texts
    assert (point.get_text(), *point.xy) == ("one", 1.5, 70.0)


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
def test_timms_train_py(tmp_path):
    """The real thing accepts the runner's command line, and leaves what is kept."""
    for i in range(4):
        for split in ("train", "validation"):
            (tmp_path / f"data/{split}/{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (60 * i, 99, 30)).save(tmp_path / f"data/{split}/{i % 2}/{i}.png")
    row = dict(options=dict(torchcompile=None, batch_size=2, validation_batch_size=2, model_kwargs=dict(last_stride=1)))
    plan = make_plan(tmp_path, a=group(dict(net=row), epochs=2, milestones=[0.5]))
    output, _ = start(plan, Path(SCRIPTS)).communicate(timeout=300)
    assert "1 of 1 runs finished" in output
    (run,) = read_runs(runs_beside(plan)).values()
    assert run["epoch"] == [0, 1]
    assert run["lr"] == pytest.approx([0.25, 0.025])
