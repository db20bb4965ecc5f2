"""Which data sources there are: this follows from the classes in `config/data.py`, and nothing else lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from pipeline.config.base import classes_by_name
from pipeline.config.data import DataConfig

SOURCES: dict[str, type[DataConfig]] = classes_by_name(DataConfig, "source")
"""Every data source by its name in the config."""

if TYPE_CHECKING:
    AnyData = DataConfig
else:
    _classes: Any = tuple(dict.fromkeys(SOURCES.values()))
    AnyData = Annotated[Union[_classes], Field(discriminator="source")]  # noqa: UP007
