"""Every setting of an experiment: its type, bounds and default. Imports no torch.

One YAML file is one experiment. `load` reads it, applies `--set key.sub=value` overrides and returns a frozen
`Experiment`; all problems are reported at once, with a "did you mean" for unknown keys.

Students are named sets of overrides over `train`, so that what differs between two students is what the file says:

    train:    {model: toy/resnet, width: 8, loss: kd, temperature: 5, epochs: 30}
    students:
      kd:     {}
      e2kd:   {explanation_weight: 10}
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from artifacts.errors import ConfigError
from pipeline.problems import describe, unknown_key

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- data -----------------------------------------------------------------------------------------------------------


class Source(Settings):
    """What every source has."""

    limit: Positive | None = Field(None, description="use only the first `limit` images of each split")


class ToyBirds(Source):
    """Waterbirds-100 in miniature (48 px, generated): background = class in training, reversed out of distribution."""

    source: Literal["toybirds"]
    seed: Annotated[int, Field(ge=0)] = 0


class ToyShapes(Source):
    """Ten silhouettes on unrelated backgrounds (48 px, generated), for the few-shot question."""

    source: Literal["toyshapes"]
    seed: Annotated[int, Field(ge=0)] = 0
    train_per_class: Positive = 20


class Folder(Source):
    """A folder of photographs: `train/` and `val/`, or class sub-folders, or flat and unlabelled."""

    source: Literal["folder"]
    root: Annotated[Path, AfterValidator(Path.expanduser)]
    val_fraction: Fraction = 0.1
    labels: bool = Field(True, description="false: ignore the class sub-folders (images of another data set)")


DataConfig = Annotated[ToyBirds | ToyShapes | Folder, Field(discriminator="source")]
SOURCES: dict[str, type[BaseModel]] = {"toybirds": ToyBirds, "toyshapes": ToyShapes, "folder": Folder}


class ViewConfig(Settings):
    """The canonical view: shorter side resized to `resize` (default: `size`), then the centre `size` x `size` px."""

    size: Annotated[int, Field(ge=8, le=1024)]
    resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @model_validator(mode="after")
    def _crop_fits(self) -> ViewConfig:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")
        return self


class AugmentConfig(Settings):
    """Geometry drawn once per sample for the image and its map; colour changes are for the image only."""

    enabled: bool = True
    crop_scale: tuple[float, float] | None = Field(
        (0.08, 1.0), description="area share of a random resized crop"
    )
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Fraction = 0.5
    vflip: Fraction = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="degrees, plus or minus")
    translate: Fraction = 0.0
    shear: Annotated[float, Field(ge=0, lt=90)] = Field(0.0, description="degrees, plus or minus")
    fill: tuple[float, float, float] | float = Field(0.5, description="colour (0..1) outside the frame")
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grayscale: Fraction = 0.0

    @model_validator(mode="after")
    def _ranges_in_order(self) -> AugmentConfig:
        scale = self.crop_scale
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crop_scale must be two area shares 0 < low <= high <= 1, got {list(scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got {list(self.crop_ratio)}")
        return self


# --- models and training ------------------------------------------------------------------------------------------


class ModelConfig(Settings):
    """A classifier: `toy/resnet`, `torchvision/NAME`, `timm/NAME` or `bcos/NAME`, and where its weights come from."""

    model: str
    width: Positive = Field(16, description="channels of the first block; toy/resnet and bcos/small only")
    weights: str | None = Field(
        None,
        description="a .safetensors or state-dict file; published: torchvision:TAG, timm:TAG, bcos:TAG, lite0, lite2; "
        "none or null: random",
    )
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    @model_validator(mode="after")
    def _weights_are_the_familys(self) -> ModelConfig:
        origin, colon, _ = (self.weights or "").partition(":")
        family = self.model.partition("/")[0]
        if colon and origin in ("torchvision", "timm", "bcos") and origin != family:
            raise ValueError(f"weights: {self.weights} fit a model named {origin}/NAME, not {self.model}")
        return self


class Schedule(Settings):
    """What every training run has, a teacher's and a student's."""

    epochs: Positive = 30
    batch_size: Positive = Field(64, description="samples of one step over all processes")
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = Field(0.9, description="SGD only")
    warmup: Fraction = Field(
        0.05, description="share of the steps with linearly rising rate; then cosine to 0"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    agc: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="adaptive gradient clipping: largest gradient norm per weight norm of a unit; B-cos: 0.01",
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every: Positive = Field(1, description="epochs between validations and checkpoints")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are the result")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="data-loader processes")
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        1024, description="keep decoded images in memory up to this size"
    )
    augment: AugmentConfig = AugmentConfig()


class GuideConfig(Settings):
    """Look at the object: adds weight * (1 - energy of the label's map inside the mask or box) to the loss."""

    by: Literal["mask", "box"] = "mask"
    weight: NonNegative = 2.0


class TeachConfig(Schedule):
    """How `e2kd teach` trains the teacher: on the labels of `split`, optionally guided."""

    split: str = "train"
    seed: int = 0
    loss: Literal["ce", "bce"] = "ce"
    guide: GuideConfig | None = None


class TeacherConfig(ModelConfig):
    """The teacher: pretrained `weights`, or `train` to have `e2kd teach` train it."""

    classes: Positive | None = Field(None, description="default: the data's; for unlabelled data, say it")
    train: TeachConfig | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.train is None) == (self.weights is None):
            raise ValueError(
                "give either weights (a pretrained teacher) or train (teach one here), not both or none"
            )
        return self


class StudentConfig(Schedule, ModelConfig):
    """One student: its architecture, its data, its loss (paper Eq. 2) and its schedule."""

    split: str = "train"
    rows: Positive | None = Field(None, description="use the first rows of the split only")
    shots: Positive | None = Field(None, description="use the first n images of each class only")
    loss: Literal["ce", "bce", "kd"] = Field(
        "kd", description="ce: labels; bce: labels, for B-cos; kd: the teacher's logits (Eq. 1)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="tau of Eq. 1")
    explanation_weight: NonNegative = Field(0.0, description="lambda of Eq. 2")
    explain_every: Positive = Field(
        1, description="the explanation's term in every k-th step only (lambda is not scaled up)"
    )
    compile: bool = Field(
        False, description="torch.compile the step, explanation included; the first takes a minute or two"
    )
    mode: Literal["frozen", "online"] = Field(
        "frozen", description="stored targets, or the teacher in each step"
    )

    @property
    def needs_teacher(self) -> bool:
        return self.loss == "kd" or self.explanation_weight > 0

    @property
    def asks_online(self) -> bool:
        return self.needs_teacher and self.mode == "online"


class ExplainConfig(Settings):
    """What is explained and how; the same for teacher and student."""

    explainer: Literal["auto", "gradcam", "bcos"] = Field(
        "auto", description="auto: bcos (dynamic weights) for B-cos networks, gradcam for others"
    )
    logit: Literal["raw", "centred"] = Field(
        "raw", description="raw: paper; centred: class logit minus mean logit"
    )
    compare_at: Literal["student", "input"] = Field(
        "student",
        description="size at which maps are compared: the student's own, or the image's (the authors' code)",
    )


class StoreConfig(Settings):
    """How the teacher's answers are stored."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="default: explainer and logit")
    maps: Literal["auto", "fp16", "int8", "int6", "int5", "lossless"] = Field(
        "auto", description="auto: fp16 for GradCAM, int6 for maps of the input's size (B-cos)"
    )
    logits: Literal["fp16", "uint12", "fp32"] = "fp16"
    rows_per_shard: Annotated[int, Field(ge=1, le=65536)] = 1024
    batch_size: Positive = Field(64, description="images per teacher forward pass")


class EvaluateConfig(Settings):
    """Which packed splits are scored; `select` chooses epochs (and, by you, settings) and is reported apart."""

    splits: tuple[str, ...] = ("test",)
    select: str | None = "val"
    batch_size: Positive = 250


def explained_by(model: str) -> str:
    """The explainer of a model, by its family."""
    return "bcos" if model.startswith("bcos/") else "gradcam"


class Experiment(Settings):
    """One experiment: one config file, one folder `out/<name>/`."""

    data: DataConfig
    artifacts: str | None = Field(
        None,
        description="folder or fsspec URL (s3://...) for image sets and stores; default: the experiment's folder",
    )
    view: ViewConfig
    teacher: TeacherConfig
    explain: ExplainConfig = ExplainConfig()
    store: StoreConfig = StoreConfig()
    augment: AugmentConfig = AugmentConfig()
    students: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], StudentConfig] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _comparable(self) -> Experiment:
        for name, student in self.students.items():
            if student.explanation_weight > 0 and explained_by(student.model) != explained_by(
                self.teacher.model
            ):
                raise ValueError(
                    f"student {name}: its explanations ({explained_by(student.model)}) cannot match the teacher's "
                    f"({explained_by(self.teacher.model)}); set explanation_weight to 0, or use models of one kind"
                )
        return self

    @property
    def explainer(self) -> str:
        """The teacher's."""
        return (
            explained_by(self.teacher.model) if self.explain.explainer == "auto" else self.explain.explainer
        )

    @property
    def store_name(self) -> str:
        return self.store.name or f"{self.explainer}-{self.explain.logit}"

    @property
    def answered_splits(self) -> tuple[str, ...]:
        """Splits the teacher answers for in stage 1: what students train on, select on and are scored on."""
        select = (self.evaluate.select,) if self.evaluate.select else ()
        students = tuple(student.split for student in self.students.values())
        return tuple(dict.fromkeys((*students, *select, *self.evaluate.splits)))

    @property
    def packed_splits(self) -> tuple[str, ...]:
        """Every split that some stage reads."""
        taught = (self.teacher.train.split,) if self.teacher.train else ()
        return tuple(dict.fromkeys((*taught, *self.answered_splits)))


# --- loading ---------------------------------------------------------------------------------------------------------


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file, apply `key.sub=value` overrides and validate.

    Raises ConfigError that lists every problem at once.
    """
    raw = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    return parse(raw, where=str(path))


def parse(raw: Mapping[str, Any], where: str = "config") -> Experiment:
    """Validate an already read config. Raises ConfigError that lists every problem at once."""
    resolved, problems = _resolve_students(copy.deepcopy(dict(raw)))
    try:
        experiment = Experiment.model_validate(resolved)
    except ValidationError as error:
        problems += [
            describe(problem, Experiment, SOURCES, more_keys=["train"]) for problem in error.errors()
        ]
    if problems:
        distinct = list(dict.fromkeys(problems))
        lines = "\n".join(f"  {problem}" for problem in distinct)
        raise ConfigError(f"{where} has {len(distinct)} problem{'s' if len(distinct) > 1 else ''}:\n{lines}")
    return experiment


def dump(settings: Settings) -> str:
    """The resolved settings as YAML, in the order of the class."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=100)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.yaml?" if near else "; the configs are in configs/"
        raise ConfigError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(Experiment.model_fields)}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key.sub=value, e.g. --set train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value: {error}") from None
    *parents, last = key.split(".")
    section: Any = raw
    for name in parents:
        section = section.setdefault(name, {}) if section.get(name) is not None else _replace(section, name)
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
    section[last] = value


def _replace(section: dict[str, Any], name: str) -> dict[str, Any]:
    section[name] = {}
    return section[name]


def _resolve_students(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Lay `augment` under `teacher.train` and `train`, and `train` under each student. Returns (config, problems)."""
    defaults = raw.pop("train", None) or {}
    augment = raw.get("augment") or {}
    problems = [
        f"{name}: must be a section (a mapping)"
        for name, section in (("train", defaults), ("augment", augment))
        if not isinstance(section, dict)
    ]
    if problems:
        return {**raw, "augment": {}}, problems
    problems += _unknown_keys("train", defaults, StudentConfig)
    defaults = {key: value for key, value in defaults.items() if key in StudentConfig.model_fields}
    students = raw.get("students")
    if isinstance(students, dict):
        merged = {
            str(name): _merge({"augment": augment}, defaults, own or {})
            if isinstance(own, dict | None)
            else own
            for name, own in students.items()
        }
        raw["students"] = merged
    teacher = raw.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), dict):
        teacher["train"] = _merge({"augment": augment}, teacher["train"])
    return raw, problems


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; sections are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return copy.deepcopy(merged)


def _unknown_keys(where: str, section: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    known = list(model.model_fields)
    return [unknown_key(f"{where}.{key}", known) for key in section if key not in known]
