"""Sections that most recipes do without: their classes are loaded, and their checks built, where one is written."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pydantic_core import core_schema

if TYPE_CHECKING:
    from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue


class Late:
    """Annotation of a field whose class, ``name`` in ``module``, is loaded with the first value.

    What is wrong is told at its place, and JSON Schema has the section, as if the class stood there.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def model(self) -> type[BaseModel]:
        """The class."""
        found: type[BaseModel] = getattr(importlib.import_module(self.module), self.name)
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: self.model.model_validate(value))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        self.model.model_rebuild()
        return handler(self.model.__pydantic_core_schema__)
