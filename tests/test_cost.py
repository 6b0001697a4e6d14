import math
from pathlib import Path

import pytest
import torch

from benchmarks import update
from benchmarks.cost import Check, Table, create, main, measure, problems, tables, terms
from timm_gsop.hub.model_card import count_macs, model_macs
from timm_gsop.layers import ChannelGsop

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured() -> dict[str, Table]:
    return tables()


def test_every_figure_is_within_its_tolerance_and_every_difference_explained(measured):
    checks = [check for _, checks in measured.values() for check in checks]
    assert len(checks) > 40
    assert problems(checks) == []


@pytest.mark.parametrize(
    ("measured", "note", "tolerance", "problem"),
    [
        (1.02, 0, 0.03, None),
        (1.5, 1, 0.6, None),
        (1.5, 1, 0.03, "net: 1.5, the paper reports 1.0; tolerance 3%."),
        (math.nan, 0, 0.03, "net: nan, the paper reports 1.0; tolerance 3%."),
        (1.5, 0, 0.6, "over 3 % and without a note"),
        (1.0, 1, 0.03, "or the reverse"),
    ],
)
def test_a_wrong_figure_is_refused(measured, note, tolerance, problem):
    found = problems([Check("net", measured, "1.0", note, tolerance)])
    assert [problem in line for line in found] == ([] if problem is None else [True])


def test_resnet50_as_everybody_counts_it():
    assert measure("resnet50") == (25_557_032, 4_089_184_256)


def test_a_call_of_several_modules_counts_them_all():
    first, second, x = torch.nn.Linear(2, 3), torch.nn.Linear(3, 5), torch.ones(1, 2)
    assert count_macs(lambda: second(first(x)))[""] == 2 * 3 + 3 * 5


@pytest.mark.parametrize("name", ["gsop_resnet26_net2", "gsop_preresnet20_net1", "isqrt_preresnet164"])
def test_the_terms_are_the_whole(name):
    model = create(f"{name}.untrained")
    parts = terms(model, model.pretrained_cfg["input_size"])
    kinds = ("backbone", "reduction", "covariance", "excitation", "head")
    assert sum(parts[kind] for kind in kinds) == measure(f"{name}.untrained").macs
    if name == "gsop_preresnet20_net1":  # by hand: d² for each position, in maps of 32², 16² and 16²
        assert parts["covariance"] == 64**2 * (32**2 + 16**2 + 16**2)


@pytest.mark.parametrize(("name", "figure"), [("gsop_preresnet164_net1", 0.55), ("gsop_preresnet164_net2", 0.58)])
def test_the_explanation_of_table_6_holds(name, figure):
    assert terms(create(name), (3, 32, 32))["as in Table 6"] / 1e9 == pytest.approx(figure, rel=0.0105)


def test_the_documents_say_what_the_command_prints(measured):
    for page in ((ROOT / name).read_text() for name in ("docs/cost.md", "docs/models.md")):
        assert update(page, {name: text for name, (text, _) in measured.items()}) == page
        shown = [text in page for text, _ in measured.values()]
        assert sum(shown) == page.count("<!-- end -->") > 0


def test_the_command_updates_a_page(tmp_path, measured, monkeypatch):
    monkeypatch.setattr("benchmarks.cost.tables", lambda: measured)  # they take a while
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table 3 -->\n\n<!-- end -->\nafter\n")
    assert main(["--update", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table 3 -->\n| layer |")
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert "| conv5_x | 14×14 |" in text


def test_update_fills_empty_markers_and_nothing_else():
    page = "a\n<!-- x -->\n<!-- end -->\nb\n<!-- y -->\nold\n<!-- end -->\n"
    assert update(page, {"x": r"\1"}) == page.replace("<!-- x -->\n", "<!-- x -->\n\\1\n")


@pytest.mark.parametrize(
    ("name", "kwargs", "gmacs"),
    [("resnet50", {}, 3.86), ("resnet50", dict(output_stride=8), 19.00)],
)
def test_the_explanations_of_table_5_hold(name, kwargs, gmacs):
    """Stride in the first 1×1 convolution of a stage."""
    model = create(name, **kwargs)
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, (1, 1)
    assert model_macs(model, (3, 224, 224))[""] / 1e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize(
    ("name", "stage", "gmacs"),
    [
        ("gsop_preresnet164_net1", "stages.0.", 0.547),
        ("gsop_preresnet164_net2", "stages.0.", 0.579),
        ("gsop_resnet50_net1", "layer1.", 1.561 * 4.0892),
        ("gsop_resnet50_net1", None, 1.585 * 4.0892),
    ],
)
def test_counted_as_in_table_2_with_and_without_stride_in_the_first_reductions(name, stage, gmacs):
    model = create(name)
    for module_name, module in model.named_modules():
        if stage and module_name.startswith(stage) and isinstance(module, ChannelGsop):
            module.reduction.conv.stride = (2, 2)
    counted = terms(model, model.pretrained_cfg["input_size"])["as in Table 2"] / 1e9
    assert counted == pytest.approx(gmacs, rel=0.001)
