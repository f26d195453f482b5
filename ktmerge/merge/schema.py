"""The JSON Schema of recipes, by which editors complete and check them. Loads no torch.

The recipe's own keys come from its model, the parameters beside ``blend.method`` from the registry: each method has its
own. ``python -m ktmerge.merge.schema`` writes the file that is shipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.files import write_whole
from ktmerge.merge.registry import methods, stages
from ktmerge.merge.settings import FLOAT_CLASSES, blend_setting
from ktmerge.merge.stage import KINDS, Method, Parameters
from ktmerge.recipes.load import FIXED_BLEND_KEYS, FIXED_RULE_KEYS
from ktmerge.recipes.schema import Blend, Recipe
from ktmerge.recipes.suites import Suite

FOLDER = Path(__file__).parent.parent / "recipes" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema of a recipe file."""
    schema = _with_shorthands(Recipe.model_json_schema(by_alias=True))
    definitions = schema["$defs"]
    parameters = {name: _of_method(method) for name, method in methods().items()}
    definitions |= {f"parameters of {name}": {"properties": one} for name, one in parameters.items()}
    names = _names()
    for definition, fixed in (("Blend", FIXED_BLEND_KEYS), ("WhereRule", FIXED_RULE_KEYS)):
        definitions[definition]["properties"]["method"] = names
        definitions[definition]["additionalProperties"] = True
        definitions[definition]["allOf"] = [_only(name, fixed | set(own)) for name, own in parameters.items()]
    definitions["Blend"]["properties"]["stages"] = _stages()
    definitions["Blend"]["allOf"] += [
        {"oneOf": [_given("method", "string"), _given("stages", "object")]},
        *(_only(name, FIXED_RULE_KEYS | set(own), in_rules=True) for name, own in parameters.items()),
        _only_with_stages(),
    ]
    definitions["WhereRule"]["allOf"] += _said_of_rules()
    definitions["Evaluation"]["anyOf"] = [
        _given("suite", "string"), _given("upstream", "array"), _given("downstream", "array")
    ]  # fmt: skip
    return _titled("ktmerge recipe", schema)


def suite_schema() -> Schema:
    """The schema of a suite file."""
    return _titled("ktmerge suite", _with_shorthands(Suite.model_json_schema(by_alias=True)))


def _titled(title: str, schema: Schema) -> Schema:
    return {"$schema": DIALECT, "title": title, **{key: one for key, one in schema.items() if key != "title"}}


SCHEMAS = {"recipe": recipe_schema, "suite": suite_schema}


def text(schema: Mapping[str, Any]) -> str:
    """A schema as it is shipped."""
    return json.dumps(_without_titles(schema), indent=1, ensure_ascii=False) + "\n"


def _without_titles(value: Any) -> Any:
    """Without the titles made from names of keys, which say nothing that the keys do not."""
    if isinstance(value, list):
        return [_without_titles(one) for one in value]
    if not isinstance(value, dict):
        return value
    noise = isinstance(value.get("title"), str) and "$schema" not in value
    return {key: _without_titles(one) for key, one in value.items() if not (noise and key == "title")}


def _names() -> Schema:
    """What may stand as a method, each with when to use it."""
    known = [{"const": name, "description": method.summary} for name, method in methods().items()]
    foreign = {"type": "string", "pattern": "^mergekit:", "description": "a method of mergekit's tensor interface"}
    return {"description": "a preset of stages, or mergekit:<name>", "anyOf": [*known, foreign, {"type": "null"}]}


def _of_method(method: Method) -> dict[str, Schema]:
    """The parameters of a method, of all its stages for all classes of tensors together."""
    found: dict[str, Schema] = {}
    pipelines = blend_setting(Blend(method=method.name)).pipelines
    for kind in reversed(FLOAT_CLASSES):  # what holds for matrices has the last word
        for use in pipelines[kind].uses:
            for key, one in _properties(type(use.parameters)).items():
                default = getattr(use.parameters, key)
                found[key] = {**one, "default": json.loads(json.dumps(default))}
    return dict(sorted(found.items()))


@cache
def _properties(parameters: type[Parameters]) -> dict[str, Schema]:
    """The properties of a stage's parameters, which many methods share."""
    model = parameters.model_json_schema()
    return {key: _inlined(one, model) for key, one in model.get("properties", {}).items()}


def _inlined(schema: Schema, whole: Schema) -> Schema:
    """A property without references into definitions that are not here."""
    reference = schema.get("$ref", "").rpartition("/")[2]
    return {**whole["$defs"][reference], **{k: v for k, v in schema.items() if k != "$ref"}} if reference else schema


def _only(name: str, keys: Iterable[str], *, in_rules: bool = False) -> Schema:
    """With this method, these keys and no others; or so in those rules that name no other method."""
    own = {"$ref": f"#/$defs/parameters of {name}", "propertyNames": {"enum": sorted(keys)}}
    rule = {"if": {"not": _given("method", "string")}, "then": own}
    return {
        "if": {"required": ["method"], "properties": {"method": {"const": name}}},
        "then": {"properties": {"where": {"items": rule}}} if in_rules else own,
    }


def _only_with_stages() -> Schema:
    """With stages spelled out, parameters that some stage has."""
    known = {key for stage in stages().values() for key in _properties(stage.parameters)}
    return {"if": _given("stages", "object"), "then": {"propertyNames": {"enum": sorted(FIXED_BLEND_KEYS | known)}}}


def _said_of_rules() -> list[Schema]:
    """A rule says where and what, and copies or blends."""
    places = {"part": "string", "match": "string", "class": "string"}
    actions = {"keep": "string", "method": "string", "lambda": "number"}
    further = {"not": {"propertyNames": {"enum": sorted(FIXED_RULE_KEYS)}}}
    nothing = {"properties": {"method": {"type": "null"}, "lambda": {"type": "null"}}}
    return [
        {"anyOf": [_given(key, kind) for key, kind in places.items()]},
        {"anyOf": [*(_given(key, kind) for key, kind in actions.items()), further]},
        {"if": _given("keep", "string"), "then": {**nothing, "propertyNames": further["not"]["propertyNames"]}},
    ]


def _given(key: str, kind: str) -> Schema:
    """The key is there, and its value of this type."""
    return {"required": [key], "properties": {key: {"type": kind}}}


def _stages() -> Schema:
    """The stages spelled out: of each kind, a name or ``{name: parameters}``, or a list of those."""
    kinds: dict[str, Schema] = {}
    for kind in KINDS:
        entries: list[Schema] = []
        for stage in stages().values():
            if stage.kind != kind:
                continue
            properties = _properties(stage.parameters)
            parameters = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
            entries += [
                {"const": stage.name, "description": stage.summary},
                {
                    "type": "object",
                    "description": stage.summary,
                    "properties": {stage.name: parameters},
                    "required": [stage.name],
                    "additionalProperties": False,
                },
            ]
        kinds[kind] = {"anyOf": [*entries, {"type": "array", "items": {"anyOf": entries}}]}
    return {
        "description": "the stages spelled out, instead of a method",
        "type": ["object", "null"],
        "properties": kinds,
        "additionalProperties": False,
    }


def _with_shorthands(schema: Schema) -> Schema:
    """What the loader also takes: one file where a list of files may stand, and the like."""
    for definition in schema.get("$defs", {}).values():
        for key, one in definition.get("properties", {}).items():
            if _is_list_of_text(one) and key not in ("choices", "labels"):
                definition["properties"][key] = _either(one, {"type": "string"})
    job = schema.get("$defs", {}).get("FinetuneJob", {}).get("properties", {})
    if "train" in job:
        job["train"] = _either(job["train"], {"type": "array", "items": {"type": ["string"]}})
    if "Statistics" in schema.get("$defs", {}):
        for owner in (schema, schema["$defs"]["Expert"]):
            owner["properties"]["statistics"] = _either(
                owner["properties"]["statistics"], {"type": "string", "minLength": 1}
            )
    return schema


def _is_list_of_text(schema: Schema) -> bool:
    return schema.get("type") == "array" and schema.get("items", {}).get("type") == "string"


def _either(schema: Schema, other: Schema) -> Schema:
    said: Schema = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    return {**said, "anyOf": [{key: value for key, value in schema.items() if key not in said}, other]}


def main() -> None:
    """Write the schemas that are shipped."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in SCHEMAS.items():
        write_whole(FOLDER / f"{name}.schema.json", text(make()))


if __name__ == "__main__":
    main()
