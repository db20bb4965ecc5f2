"""Which data sources there are: this follows from the classes in `config/data.py`, and nothing else lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

from pipeline.config.data import DataConfig


def _named(base: type[DataConfig]) -> Iterator[tuple[str, type[DataConfig]]]:
    """(source, class) of every class below `base` that says its names in the literal type of `source`."""
    for cls in base.__subclasses__():
        for name in get_args(cls.model_fields["source"].annotation):
            yield name, cls
        yield from _named(cls)


SOURCES: dict[str, type[DataConfig]] = dict(_named(DataConfig))
"""Every data source by its name in the config."""

if TYPE_CHECKING:
    AnyData = DataConfig
else:
    _classes: Any = tuple(dict.fromkeys(SOURCES.values()))
    AnyData = Annotated[Union[_classes], Field(discriminator="source")]  # noqa: UP007
