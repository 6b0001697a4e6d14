from pathlib import Path

import pytest
from PIL import Image

from tests.fresh_process import run_fresh
from timm_gsop.viz import draw_curves
from timm_gsop.viz.__main__ import main
from timm_gsop.viz.curves import _name, read_summary

ROOT = Path(__file__).parents[1]

HEADER = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"


def summary(path: Path, *top1: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{epoch},{2 / (epoch + 1)},{1 / (epoch + 1)},{value},99.0,0.1" for epoch, value in enumerate(top1)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def test_curves_are_the_errors_and_losses(tmp_path):
    runs = {
        "a": read_summary(summary(tmp_path / "a.csv", 50, 75.5)),
        "b": read_summary(summary(tmp_path / "b.csv", 40)),
    }
    error, loss = draw_curves(runs).axes
    assert [line.get_xydata().tolist() for line in error.lines] == [[[1, 50], [2, 24.5]], [[1, 60]]]
    assert [text.get_text() for text in error.get_legend().texts] == ["a, 24.50 %", "b, 60.00 %"]
    training, validation = loss.lines[:2]
    assert training.get_xydata().tolist() == [[1, 2], [2, 1]]
    assert validation.get_xydata().tolist() == [[1, 1], [2, 0.5]]
    assert training.get_linestyle() != validation.get_linestyle()
    assert training.get_color() == validation.get_color() == error.lines[0].get_color()


def test_a_resumed_run_counts_its_epochs_once(tmp_path):
    path = summary(tmp_path / "a.csv", 50, 60)
    path.write_text(path.read_text() + f"{HEADER}\n1,1,1,65,99,0.1\n2,1,1,70,99,0.1\n")
    assert read_summary(path)["eval_top1"] == [50, 65, 70]
    assert read_summary(path)["epoch"] == [0, 1, 2]


def test_command_line(tmp_path):
    paths = [summary(tmp_path / name / "summary.csv", 50, 60) for name in ("net1", "net2")]
    done = run_fresh("-m", "timm_gsop.viz", "curves", *paths, "-o", tmp_path / "curves.png", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "curves.png").size == (1200, 480)
    assert {path.name for path in tmp_path.iterdir()} == {"net1", "net2", "curves.png"}


def test_names_of_runs(tmp_path):
    paths = [tmp_path / name for name in ("a/summary.csv", "b/summary.csv", "c/net1-0.csv", "d/x.csv", "e/x.csv")]
    names = [_name(path, paths) for path in paths]
    assert names == ["a", "b", "net1-0", str(tmp_path / "d/x.csv"), str(tmp_path / "e/x.csv")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "no epoch with eval_top1"),
        (f"{HEADER}\n", "no epoch with eval_top1"),
        ("a,b\n1,2\n", "is not a summary of timm's train.py: KeyError"),
        (f"{HEADER}\n0,1,1,fine,99,0.1\n", "is not a summary"),
        (f"{HEADER}\n0,1,1\n", "is not a summary"),
        ("epoch,train_loss\n0,1\n", "no epoch with eval_top1"),
    ],
)
def test_other_files_are_named(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "summary.csv").write_text(content)
    with pytest.raises(SystemExit):
        main(["curves", str(tmp_path / "summary.csv"), "-o", str(tmp_path / "curves.png")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()
