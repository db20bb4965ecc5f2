"""The tables of explainers and of model families name the same as the config, and the section `explain` is a union."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import ConfigError
from pipeline import explain
from pipeline.config import ModelConfig, parse
from pipeline.config.experiment import EXPLAIN_SETTINGS
from pipeline.config.models import FAMILIES
from pipeline.models import build
from pipeline.models.zoo import BUILDERS

RAW: dict[str, Any] = {
    "data": {"source": "toybirds"},
    "view": {"size": 48},
    "teacher": {"model": "toy/resnet", "train": {}},
    "students": {"gradcam": {"model": "toy/resnet"}},
}


def test_every_explainer_has_a_section_and_the_other_way_round() -> None:
    assert EXPLAIN_SETTINGS.keys() == {"auto", *explain.EXPLAINERS}


def test_every_family_has_a_builder_and_an_explainer() -> None:
    assert list(FAMILIES) == list(BUILDERS)
    assert {family.explainer for family in FAMILIES.values()} <= explain.EXPLAINERS.keys()
    models = {"toy": "resnet", "torchvision": "resnet18", "timm": "resnet18", "bcos": "small"}
    for name, family in FAMILIES.items():
        network = build(ModelConfig(model=f"{name}/{models[name]}", width=4), 3)
        assert network.explained_by == family.explainer


@pytest.mark.parametrize(("name", "channels", "codec"), [("gradcam", 1, "fp16"), ("bcos", 6, "int6")])
def test_a_store_is_laid_out_by_the_explainers_class(name: str, channels: int, codec: str) -> None:
    assert explain.by_name(name).channels == channels
    assert explain.by_name(name).codec == codec


@pytest.mark.parametrize(
    ("section", "explainer"),
    [
        ({}, "gradcam"),
        ({"explainer": "auto"}, "gradcam"),
        ({"logit": "centred"}, "gradcam"),
        ({"explainer": "gradcam", "logit": "centred"}, "gradcam"),
        ({"explainer": "bcos"}, "bcos"),
    ],
)
def test_an_explainer_that_is_not_named_is_the_familys(section: dict[str, Any], explainer: str) -> None:
    experiment = parse(RAW | {"explain": section})
    assert experiment.explainer == explainer
    assert experiment.explain.explainer == section.get("explainer", "auto")
    assert experiment.explain.settings == {"logit": section.get("logit", "raw")}
    assert list(experiment.explain.model_dump()) == ["explainer", "logit", "compare_at", "classes", "most"]


def test_b_cos_networks_are_explained_by_their_weights() -> None:
    teacher = {"model": "bcos/small", "train": {}}
    assert parse(RAW | {"teacher": teacher}).explainer == "bcos"


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"explainer": "gradcm"}, r"explain\.explainer: 'gradcm' is unknown; did you mean gradcam\?"),
        ({"explainer": "gradcam", "logits": "raw"}, r"explain\.logits: unknown key; did you mean logit\?"),
        ({"logit": "centered"}, r"explain\.logit: 'centered' is unknown; did you mean centred\?"),
        (7, "explain: "),
    ],
)
def test_problems_of_the_section_are_told_by_its_keys(section: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(RAW | {"explain": section})


def test_a_student_may_be_called_as_an_explainer_is() -> None:
    with pytest.raises(ConfigError, match=r"students\.gradcam\.lr: "):
        parse(RAW | {"students": {"gradcam": {"model": "toy/resnet", "lr": -1}}})


def test_an_unknown_explainer_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown explainer 'b-cos'; did you mean bcos\?"):
        explain.by_name("b-cos")
