"""The recipe, schema version 1: everything that changes the output, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

from ktmerge.recipes.late import Late
from ktmerge.recipes.section import Section, as_list

if TYPE_CHECKING:
    from ktmerge.recipes.evaluation import Evaluation
    from ktmerge.recipes.finetuning import Finetune
else:
    Evaluation = Annotated[Any, Late("ktmerge.recipes.evaluation", "Evaluation")]
    Finetune = Annotated[Any, Late("ktmerge.recipes.finetuning", "Finetune")]

SCHEMA_VERSION = 1

Factor = Annotated[float, Field(ge=-1e38, le=1e38)]
"""What deltas are multiplied by, in fp32."""


def _as_folder(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str) else value


class Statistics(Section):
    """What is measured by running a model on data, for methods that need it: a folder, or how to make it."""

    folder: str | None = Field(
        None,
        min_length=1,
        description="relative to the recipe; alone: it is already made; default: stats/<name>",
    )
    data: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="JSONL, JSON or parquet; of an expert by default what it was tuned on"
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    images: str | None = Field(None, description="folder where the images that rows name are, for models that see")
    self_generate: int | None = Field(None, ge=1, description="texts that the model writes itself, instead of data")
    samples: int = Field(256, ge=1, description="rows of the data that are used, drawn by the seed")
    tokens: int = Field(2048, ge=1, description="tokens kept of each distinct input of a linear map")
    max_length: int = Field(2048, ge=8, description="tokens; longer samples are left out")
    fisher: Literal["none", "empirical", "sampled"] = Field(
        "none", description="the diagonal Fisher information: of the data's answers, or of answers the model draws"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of the kept inputs")
    seed: int = Field(42, ge=0, lt=2**63)

    @property
    def is_job(self) -> bool:
        """Whether it says how to make the statistics, and not only where they are."""
        return self.model_fields_set != {"folder"}

    @model_serializer(mode="wrap")
    def _plain_folder(self, proper: Any) -> Any:
        return proper(self) if self.is_job else self.folder

    @model_validator(mode="after")
    def _one_source(self) -> Statistics:
        if self.data and self.self_generate is not None:
            raise ValueError("give either data or self_generate")
        return self


MaybeStatistics = Annotated[Statistics | None, BeforeValidator(_as_folder)]


class Expert(Section):
    """One fine-tuned model."""

    model: str = Field(
        description="a folder (relative to the recipe) or a hub id, `org/name@revision`; of a PEFT adapter, which is "
        "folded into the base, or into another model: `model+adapter`"
    )
    weight: Factor = Field(1.0, description="its share when several experts are combined")
    statistics: MaybeStatistics = Field(None, description="measured in it on its own data; see the top level's")


class WhereRule(Section):
    """Where to do otherwise. First match wins. Further keys are parameters of the method."""

    model_config = ConfigDict(extra="allow")

    part: str | None = Field(
        None, description="part expression: vision, connector, llm, llm.layers[0:8], embed, head, norm"
    )
    match: str | None = Field(None, description="shell pattern over tensor names, e.g. '*.norm.weight'")
    tensor_class: Literal["matrix", "embed", "vector", "conv"] | None = Field(None, alias="class")
    keep: str | None = Field(None, description="'base' or an expert's name: take its tensors unchanged")
    method: str | None = Field(None, description="another method for these tensors")
    lambda_: Factor | None = Field(None, alias="lambda")

    @model_validator(mode="after")
    def _says_where_and_what(self) -> WhereRule:
        if self.part is None and self.match is None and self.tensor_class is None:
            raise ValueError("a rule needs one of part, match, class")
        if self.keep is not None and (self.method or self.lambda_ is not None or self.parameters):
            raise ValueError("a rule with keep takes nothing else: the tensors are copied")
        if self.keep is None and self.method is None and self.lambda_ is None and not self.parameters:
            raise ValueError("a rule needs something to do: keep, method, lambda or a parameter of the method")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The method parameters this rule changes."""
        return dict(self.model_extra or {})


class Blend(Section):
    """How base and experts become one model. Keys that are not listed here are parameters of the method."""

    model_config = ConfigDict(extra="allow")

    method: str | None = Field(None, description="a preset of stages, or mergekit:<name>")
    stages: dict[str, Any] | None = Field(None, description="the stages spelled out, instead of a method")
    lambda_: Factor | None = Field(
        None, alias="lambda", description="scale of the merged delta; the method's default if absent"
    )
    where: list[WhereRule] = Field([])

    @model_validator(mode="after")
    def _method_or_stages(self) -> Blend:
        if (self.method is None) == (self.stages is None):
            raise ValueError("write either method or stages")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The method parameters written flat beside ``method``."""
        return dict(self.model_extra or {})


class Output(Section):
    """What is written."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = Field(
        "base", description="base: each tensor as in the base"
    )
    rounding: Literal["nearest", "stochastic"] = "nearest"
    vocabulary: Literal["base", "union"] = Field(
        "base", description="union: the tokens that experts added, too, with their rows"
    )
    not_finite: Literal["refuse", "keep_base"] = Field(
        "refuse", description="where base or an expert is NaN or infinite: refuse to blend, or keep the base's value"
    )


_EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Recipe(Section):
    """base + experts + blend -> one checkpoint; optionally how the experts were made and what is scored."""

    ktmerge: Literal[1] = Field(description="schema version")
    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)
    description: str = Field("", description="one line: when to use it")
    base: str | None = Field(None, description="a folder (relative to the recipe) or a hub id, `org/name@revision`")
    experts: dict[str, Expert] = Field({})
    statistics: MaybeStatistics = Field(
        None, description="measured in the base on upstream data: a folder that `ktmerge stats` made, or how to make it"
    )
    dequantise: bool = Field(False, description="read quantised inputs as the numbers they stand for; else refused")
    blend: Blend | None = None
    output: Output = Field(default_factory=lambda: Output())
    seed: int = Field(42, ge=0, lt=2**63)
    finetune: Finetune | None = None
    eval: Evaluation | None = None
    folder: Path = Field(Path("."), exclude=True, description="where relative paths start; set by the loader")

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        for name in self.experts:
            if name == "base" or not _EXPERT_NAME.fullmatch(name):
                raise ValueError(f"'{name}' cannot name an expert; use letters, digits, '-', '_', '.', and not 'base'")
        if self.finetune:
            for name in self.finetune.experts:
                if name not in self.experts:
                    raise ValueError(f"finetune.experts.{name} is not one of the experts ({', '.join(self.experts)})")
                adapter = self.finetune.experts[name].adapter
                if self.blend and adapter is not None and not adapter.family.folds:
                    raise ValueError(
                        f"finetune.experts.{name}: {adapter.name} is no change of weights, so it cannot be blended; "
                        "leave blend out, or choose another adapter (lora)"
                    )
        self._require_data()
        for rule in self.blend.where if self.blend else ():
            if rule.keep is not None and rule.keep != "base" and rule.keep not in self.experts:
                raise ValueError(f"keep: '{rule.keep}' is neither base nor an expert ({', '.join(self.experts)})")
        return self

    def statistics_of(self, name: str) -> Statistics | None:
        """What is written about the statistics of an expert, or of the ``base``."""
        return self.statistics if name == "base" else self.experts[name].statistics

    def statistics_job(self, name: str) -> Statistics | None:
        """The same, with the data that an expert is tuned on where its section names none."""
        section = self.statistics_of(name)
        tuned = self.finetune.experts.get(name) if self.finetune is not None else None
        if section is None or tuned is None or not section.is_job or section.data or section.self_generate is not None:
            return section
        own = {"data": tuned.data, "format": tuned.format, "images": section.images or tuned.image_root}
        return section.model_copy(update={key: value for key, value in own.items() if value is not None})

    def without_tuning(self) -> Recipe:
        """The same of experts that are there: not how they are tuned, but still what they are measured on."""
        jobs = {name: self.statistics_job(name) for name in self.experts}
        experts = {
            name: one if jobs[name] is one.statistics else one.model_copy(update={"statistics": jobs[name]})
            for name, one in self.experts.items()
        }
        return self.model_copy(update={"experts": experts, "finetune": None})

    def statistics_folder(self, name: str) -> Path | None:
        """Where the statistics of an expert, or of the ``base``, are or will be."""
        found = self.statistics_of(name)
        return None if found is None else self.folder / (found.folder or f"stats/{name}")

    def _require_data(self) -> None:
        """Every job that makes statistics says on what, or its expert's fine-tune does."""
        tuned = self.finetune.experts if self.finetune else {}
        for name in ("base", *self.experts):
            job = self.statistics_of(name)
            if job is not None and job.is_job and not job.data and job.self_generate is None and name not in tuned:
                where = "statistics" if name == "base" else f"experts.{name}.statistics"
                raise ValueError(f"{where}: write data (files), or self_generate (a number of texts), to measure on")
