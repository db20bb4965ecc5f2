"""The sections of models and training: `teacher`, `train`, `students`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, NonNegative, Positive, Seed, Settings, SplitName
from pipeline.config.models import FAMILIES


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
        if colon and origin in FAMILIES and FAMILIES[origin].published and origin != family:
            raise ValueError(f"weights: {self.weights} fit a model named {origin}/NAME, not {self.model}")
        return self


Score = Literal["accuracy", "agreement", "f1", "epg", "iou", "worst_group_accuracy"]
DEFAULT_SCORES: tuple[Score, ...] = ("f1", "accuracy", "agreement")
"""What chooses epochs and a sweep's runs if the config does not say it: the first of them that there is."""


class Schedule(Settings):
    """What every training run has, a teacher's and a student's."""

    epochs: Positive = 30
    batch_size: Positive = Field(64, description="samples of one step over all processes")
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = Field(0.9, description="SGD only")
    warmup: Fraction = Field(0.05, description="share of the steps with linearly rising rate")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="after the warm-up: half a cosine to 0, or the rate divided at `milestones`"
    )
    milestones: tuple[Fraction, ...] = Field(
        (0.3, 0.6, 0.9),
        description="step only: shares of the steps after which the rate is multiplied by gamma",
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="step only")
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    agc: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="adaptive gradient clipping: largest gradient norm per weight norm of a unit; B-cos: 0.01",
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every: Positive = Field(1, description="epochs between validations and checkpoints")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are the result")
    best_by: Score | None = Field(
        None, description="the score that `best` means; default: accuracy, f1 or agreement, by the labels"
    )
    workers: Annotated[int, Field(ge=0)] = Field(0, description="data-loader processes")
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        1024, description="keep decoded images in memory up to this size"
    )
    augment: AugmentConfig = AugmentConfig()


class GuideConfig(Settings):
    """Look at the object: adds weight * (a loss of the label's map against the mask or box) (Rao et al. 2023)."""

    by: Literal["mask", "box"] = "mask"
    loss: Literal["energy", "l1", "ppce", "rrr"] = Field(
        "energy", description="share of energy outside; L1 to the mask; per-pixel cross-entropy; RRR*"
    )
    weight: NonNegative = Field(
        2.0, description="on toybirds: energy 2, l1 10, rrr 50; ppce does not help there"
    )


class TeachConfig(Schedule):
    """How `e2kd teach` trains the teacher: on the labels of `split`, optionally guided."""

    split: SplitName = "train"
    seed: Seed = Field(
        1000,
        description="other than the students' seeds: with the same one, equal networks begin with equal weights",
    )
    init: str | None = Field(
        None, description="weights to start from, written as `weights`; a head for other classes starts anew"
    )
    loss: Literal["ce", "bce"] = Field("ce", description="multi-label data: bce")
    guide: GuideConfig | None = None
    pareto: tuple[Score, ...] = Field(
        (), description="keep every checkpoint that none beats in all of these scores, e.g. [f1, epg, iou]"
    )
    within: Fraction | None = Field(
        None,
        description="best_by chooses among the epochs whose first score of pareto is at most so far below the highest",
    )

    @model_validator(mode="after")
    def _chosen_from_the_front(self) -> TeachConfig:
        if self.within is not None and (self.best_by not in self.pareto or self.keep == "last"):
            raise ValueError(
                "within chooses among pareto's checkpoints: set best_by to a score of pareto, and keep to best"
            )
        return self


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


PriorName = Literal["at", "reviewkd", "catkd", "crd"]


class PriorConfig(Settings):
    """A prior method's loss on the online teacher's features, beside the logit loss: the paper's comparisons."""

    method: PriorName
    weight: NonNegative | None = Field(
        None, description="default: the method's own (at 1000, reviewkd 1, catkd 1, crd 0.8)"
    )
    pool: Positive = Field(
        2, description="catkd: side of the pooled class maps; its paper says 2, its code 4"
    )
    negatives: Positive = Field(16384, description="crd: negatives of each sample")
    ramp: Annotated[int, Field(ge=0)] = Field(
        20, description="reviewkd: epochs until its full weight; its ImageNet recipe: 0"
    )

    settings_of: ClassVar[dict[str, PriorName]] = {"pool": "catkd", "negatives": "crd", "ramp": "reviewkd"}

    @model_validator(mode="after")
    def _every_setting_acts(self) -> PriorConfig:
        """A default passes, because a dumped config names them all."""
        for key, method in self.settings_of.items():
            default = type(self).model_fields[key].default
            if method != self.method and getattr(self, key) != default:
                raise ValueError(
                    f"{key} is a setting of {method} and does nothing with {self.method}; remove it"
                )
        return self


class StudentConfig(Schedule, ModelConfig):
    """One student: its architecture, its data, its loss (paper Eq. 2) and its schedule."""

    split: SplitName = "train"
    rows: Positive | None = Field(None, description="use the first rows of the split only")
    shots: Positive | None = Field(None, description="use the first n images of each class only")
    loss: Literal["ce", "bce", "kd", "l2d"] = Field(
        "kd",
        description="ce: labels; bce: labels, for B-cos and several labels an image; kd: the teacher's logits (Eq. 1); "
        "l2d: the teacher's logits, class by class (several labels an image)",
    )
    kd_weight: NonNegative = Field(
        1.0, description="weight of the teacher's logits in the loss; kd and l2d only (Eq. 2: 1)"
    )
    label_weight: NonNegative = Field(
        0.0, description="adds the labels' loss, cross-entropy beside kd, bce beside l2d (the paper: none)"
    )
    prior: PriorConfig | None = Field(None, description="a feature-based method; needs mode: online")
    mixup: NonNegative = Field(
        0.0, description="alpha of mixup's Beta(alpha, alpha), with the next sample of the batch; 0: none"
    )
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = Field(
        None, description="magnitude of torchvision's RandAugment after crop and flip; needs mode: online"
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

    @model_validator(mode="after")
    def _prior_methods_see_the_teacher(self) -> StudentConfig:
        if self.prior is not None and self.mode == "frozen":
            raise ValueError("prior methods compare features, which no store holds: set mode to online")
        return self

    @model_validator(mode="after")
    def _stored_maps_follow_the_image(self) -> StudentConfig:
        if self.rand_augment is not None and self.mode == "frozen" and self.needs_teacher:
            raise ValueError(
                "rand_augment moves and recolours pixels that the store's answers do not follow: set mode to online, "
                "or rand_augment to null"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_of_two_losses(self) -> StudentConfig:
        if self.loss in ("ce", "bce") and (self.kd_weight != 1 or self.label_weight != 0):
            raise ValueError(
                f"kd_weight and label_weight weigh the teacher's logits and the labels against each other; loss: "
                f"{self.loss} has labels only. Remove them, or set loss to kd or l2d"
            )
        return self

    @model_validator(mode="after")
    def _l2d_has_no_temperature(self) -> StudentConfig:
        if self.loss == "l2d" and self.temperature != 1:
            raise ValueError("loss: l2d compares sigmoids without a temperature; remove temperature")
        return self

    @property
    def label_loss(self) -> Literal["ce", "bce"] | None:
        """The loss on labels, alone or beside the teacher's logits."""
        if self.loss == "ce" or self.loss == "bce":
            return self.loss
        if self.label_weight == 0:
            return None
        return "ce" if self.loss == "kd" else "bce"

    @property
    def needs_teacher(self) -> bool:
        return self.loss in ("kd", "l2d") or self.explanation_weight > 0 or self.prior is not None

    @property
    def asks_online(self) -> bool:
        return self.needs_teacher and self.mode == "online"
