"""What runs and stage 1 write down as JSON, by its types: folders are exchanged, so it is checked where it is read."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.config.base import SplitName

LARGEST = 1e39
"""About what a 32-bit float can say."""


def _in_range(number: float) -> float:
    if abs(number) > LARGEST:
        raise ValueError("it is out of range")
    return number


def _in_range_or_infinite(number: float) -> float:
    return number if math.isinf(number) else _in_range(number)


Number = Annotated[float, Field(strict=True), AfterValidator(_in_range)]
"""A number, or NaN."""
Logged = Annotated[float, Field(strict=True), AfterValidator(_in_range_or_infinite)]
"""A step's: a gradient's norm may be infinite."""
Count = Annotated[int, Field(strict=True, ge=0, lt=2**40)]
Metric = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Scores = dict[Metric, Number | None]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Codec = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Written(BaseModel):
    """A file, or a part of one. Keys that are not named here are of another version, and are left out."""

    model_config = ConfigDict(extra="ignore")


class Curve(Written):
    """A shift curve: px, and the cosine of each."""

    store: str = ""
    split: SplitName
    shifts: list[Count]
    cosine: list[Number | None]

    @model_validator(mode="after")
    def _as_long(self) -> Curve:
        if len(self.shifts) != len(self.cosine):
            raise ValueError("shifts and cosine are not of one length")
        return self


class Result(Written):
    """`result.json` of a finished run."""

    student: str = ""
    seed: int = 0
    splits: dict[SplitName, Scores] = {}
    stores: dict[SplitName, str] = {}
    seconds: dict[Metric, Number] = {}
    shift: Curve | None = None


class Line(Written):
    """A line of `metrics.jsonl`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Metric, Logged | None]

    epoch: Count


class Summary(Written):
    """Of cosines."""

    mean: Number
    p1: Number
    images: Count


class CodecCost(Written):
    """`codec-cost.json`."""

    store: str = ""
    maps: Codec
    logits: Codec
    whole: Summary
    augmented: Summary
    kl: Number
    top1: Number


class FreezingGap(BaseModel):
    """`freezing-gap.json`."""

    model_config = ConfigDict(extra="forbid")

    store: str = ""
    crop: Summary
    flip: Summary
    both: Summary


class TeacherScores(BaseModel):
    """`teacher-<split>.json`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Metric, Number | None]

    store: str = ""


def check(content: Any, model: type[BaseModel]) -> dict[str, Any]:
    """What `content` says of the keys of `model`. Raises ValueError if one is of another type, or missing."""
    return model.model_validate(content).model_dump(exclude_unset=True)
