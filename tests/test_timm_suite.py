"""timm's own tests of models, over ours: its ``tests/test_models.py`` runs as it is, with changes to its lists only.

Its lists of models hold ours and no others; our modules join its list of those with ``forward_intermediates``; and what
it grants to its Inception-v3, whose unpadded convolutions make small maps smaller, it grants to ours. Of pretrained
networks it gets those that ship; tests/test_hub.py loads the others, without the network.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import timm

import timm_gsop.models  # noqa: F401
from tests.timm_source import timm_source

OUR_MODULES = [name.rsplit(".", 1)[1] for name in sys.modules if name.startswith("timm_gsop.models.")]
OUR_MODELS = {name for tags in (False, True) for name in timm.list_models(module=OUR_MODULES, include_tags=tags)}


def _only_ours(list_models: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(list_models)
    def list_our_models(*args, **kwargs):
        ours = [name for name in list_models(*args, **kwargs) if name in OUR_MODELS]
        return [name for name in ours if timm.get_pretrained_cfg(name).file] if kwargs.get("pretrained") else ours

    return list_our_models


def _load_timm_tests() -> ModuleType:
    path = timm_source() / "tests" / "test_models.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python -m tests.timm_source downloads timm's test-suite")
    source = path.read_text()
    additions = {"FEAT_INTER_FILTERS = [": OUR_MODULES, "for f in ('inception_v3*',": ["gsop_inception_v3*"]}
    for start, ours in additions.items():
        assert source.count(start) == 1
        source = source.replace(start, start + ", ".join(map(repr, ours)) + ",")
    module = ModuleType("timm_test_models")
    sys.modules[module.__name__] = module
    with (
        mock.patch.object(timm, "list_models", _only_ours(timm.list_models)),
        mock.patch.object(timm, "list_pretrained", _only_ours(timm.list_pretrained)),
    ):
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _is_over_our_models(test: Callable[..., None]) -> bool:
    parameters = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    names = next((values for name, values, *_ in parameters if name == "model_name"), [])
    return bool(names) and set(names) <= OUR_MODELS


_timm_tests = vars(_load_timm_tests())
globals().update({name: test for name, test in _timm_tests.items() if callable(test) and _is_over_our_models(test)})
cfg_device = _timm_tests["cfg_device"]  # a fixture of theirs


@pytest.mark.parametrize("model_name", ["gsop_resnet26_net1", "gsop_resnet26_net2", "gsop_preresnet20_net2"])
@pytest.mark.parametrize(
    ("test", "kwargs"),
    [
        ("test_features_only_grad_checkpointing_backward", {}),
        ("test_head_hidden_size", dict(model_kwargs={})),
        ("test_prune_intermediate_layers_last_feature", dict(stop_early_final=True)),
        ("test_prune_intermediate_layers_params_used", {}),
        ("test_prune_to_stem_feature", {}),
        ("test_reset_classifier_keeps_pool", {}),
    ],
)
def test_what_timm_tests_on_hand_picked_models(test, kwargs, model_name):
    _timm_tests[test](model_name, **kwargs)
