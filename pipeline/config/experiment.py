"""One experiment: the sections of a config file together, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.base import Natural, PlainName, Positive, Seed, Settings, SplitName, classes_by_name
from pipeline.config.explain import Auto, ExplainConfig
from pipeline.config.grid import Candidate, candidates
from pipeline.config.models import explained_by
from pipeline.config.sources import AnyData
from pipeline.config.training import AugmentConfig, Score, StudentConfig, TeacherConfig


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("every seed once: a seed is a run")
    return seeds


def _auto_unless_named(section: Any) -> Any:
    return {"explainer": "auto", **section} if isinstance(section, Mapping) else section


class ViewConfig(Settings):
    """The canonical view: resized to `resize` (default: `size`), then the centre `size` x `size` px."""

    size: Annotated[int, Field(ge=8, le=1024)]
    resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop: Literal["centre", "squash"] = Field(
        "centre",
        description="what `resize` is: of the shorter side; squash: of both, so that nothing but the margin is lost",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> ViewConfig:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")
        return self


EXPLAIN_SETTINGS = classes_by_name(ExplainConfig, "explainer")
"""The section's class by the name of the explainer, `auto` among them."""

if TYPE_CHECKING:
    AnyExplain = ExplainConfig
else:
    AnyExplain = Annotated[
        Union[tuple(EXPLAIN_SETTINGS.values())],  # noqa: UP007
        Field(discriminator="explainer"),
        BeforeValidator(_auto_unless_named),
    ]


class StoreConfig(Settings):
    """How the teacher's answers are stored."""

    name: PlainName | None = Field(None, description="default: explainer and logit")
    maps: Literal["auto", "fp16", "int8", "int6", "int5", "lossless"] = Field(
        "auto", description="auto: the explainer's own, fp16 for GradCAM, int6 for B-cos"
    )
    logits: Literal["fp16", "uint12", "fp32"] = "fp16"
    rows_per_shard: Annotated[int, Field(ge=1, le=65536)] = 1024
    batch_size: Positive = Field(64, description="images per teacher forward pass")


class EvaluateConfig(Settings):
    """Which packed splits are scored; `select` chooses epochs (and, by you, settings) and is reported apart."""

    splits: tuple[SplitName, ...] = Field(("test",), min_length=1)
    select: SplitName | None = "val"
    select_by: Score | None = Field(
        None,
        description="the score that chooses among a sweep's runs; default: f1, accuracy or agreement, by the labels",
    )
    shifts: tuple[Natural, ...] = Field(
        (), description="diagonal shifts in px of the shift curve, e.g. [0, 1, 2]"
    )
    shift_images: Positive = Field(256, description="images of the first split that the curve is measured on")
    batch_size: Positive = 250


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)]


class Experiment(Settings):
    """One experiment: one config file, one folder `out/<name>/`."""

    data: AnyData
    also: dict[Name, AnyData] = Field(
        {}, description="unlabelled images of other data sets; the split NAME/train is the train of also.NAME"
    )
    artifacts: str | None = Field(
        None,
        description="folder or fsspec URL (s3://...) for image sets and stores; default: the experiment's folder",
    )
    view: ViewConfig
    teacher: TeacherConfig
    explain: AnyExplain = Auto()
    store: StoreConfig = StoreConfig()
    augment: AugmentConfig = AugmentConfig()
    students: dict[Name, StudentConfig] = Field(min_length=1)
    sweep: dict[Name, dict[str, tuple[Any, ...]]] = Field(
        {},
        description="student: {key: values}: every combination is trained; the best on evaluate.select counts",
    )
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_each_once)] = Field((0,), min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()
    paper: str | None = Field(
        None, description="the paper's numbers to show beside ours, e.g. table1/50-shots"
    )

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """Every student that is trained, by its name; a student without a sweep is its own only candidate."""
        return {candidate.name: candidate for candidate in candidates(self.students, self.sweep)}

    @model_validator(mode="after")
    def _comparable(self) -> Experiment:
        for name, student in self.students.items():
            own = self._explainer_of(student.model)
            if student.explanation_weight > 0 and own != self.explainer:
                raise ValueError(
                    f"student {name}: its explanations ({own}) cannot match the teacher's ({self.explainer}); set "
                    "explanation_weight to 0, or use models of one kind"
                )
        return self

    @model_validator(mode="after")
    def _sweeps_select(self) -> Experiment:
        if self.sweep and self.evaluate.select is None:
            raise ValueError("a sweep is decided on a validation split: set evaluate.select, or remove sweep")
        return self

    @property
    def explainer(self) -> str:
        """The name of the teacher's."""
        return self._explainer_of(self.teacher.model)

    def _explainer_of(self, model: str) -> str:
        return explained_by(model) if self.explain.explainer == "auto" else self.explain.explainer

    @property
    def store_name(self) -> str:
        return self.store.name or f"{self.explainer}-{self.explain.logit}"

    @property
    def answered_splits(self) -> tuple[str, ...]:
        """Splits the teacher answers for in stage 1: what students train on, select on and are scored on."""
        select = (self.evaluate.select,) if self.evaluate.select else ()
        students = tuple(candidate.settings.split for candidate in self.candidates.values())
        return tuple(dict.fromkeys((*students, *select, *self.evaluate.splits)))

    @property
    def packed_splits(self) -> tuple[str, ...]:
        """Every split that some stage reads."""
        taught = (self.teacher.train.split,) if self.teacher.train else ()
        return tuple(dict.fromkeys((*taught, *self.answered_splits)))
