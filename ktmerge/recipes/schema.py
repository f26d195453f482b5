"""The recipe, schema version 1: everything that changes the output, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from ktmerge.recipes import adapters, training
from ktmerge.recipes.suites import Task

SCHEMA_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_sum(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, list) else value


def _as_folder(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str) else value


class Statistics(_Section):
    """What is measured by running a model on data, for methods that need it: a folder, or how to make it."""

    folder: str | None = Field(
        None,
        min_length=1,
        description="relative to the recipe; alone: it is already made; default: stats/<name>",
    )
    data: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="JSONL, JSON or parquet; of an expert by default what it was tuned on"
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


class Expert(_Section):
    """One fine-tuned model."""

    model: str = Field(
        description="a folder (relative to the recipe) or a hub id, `org/name@revision`; of a PEFT adapter, which is "
        "folded into the base, or into another model: `model+adapter`"
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="its share when several experts are combined")
    statistics: MaybeStatistics = Field(None, description="measured in it on its own data; see the top level's")


class WhereRule(BaseModel):
    """Where to do otherwise. First match wins. Further keys are parameters of the method."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    part: str | None = Field(
        None, description="part expression: vision, connector, llm, llm.layers[0:8], embed, head, norm"
    )
    match: str | None = Field(None, description="shell pattern over tensor names, e.g. '*.norm.weight'")
    tensor_class: Literal["matrix", "embed", "vector", "conv"] | None = Field(None, alias="class")
    keep: str | None = Field(None, description="'base' or an expert's name: take its tensors unchanged")
    method: str | None = Field(None, description="another method for these tensors")
    lambda_: float | None = Field(None, alias="lambda", allow_inf_nan=False)

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


class Blend(BaseModel):
    """How base and experts become one model. Keys that are not listed here are parameters of the method."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    method: str | None = Field(None, description="a preset of stages, or mergekit:<name>")
    stages: dict[str, Any] | None = Field(None, description="the stages spelled out, instead of a method")
    lambda_: float | None = Field(
        None,
        alias="lambda",
        allow_inf_nan=False,
        description="scale of the merged delta; the method's default if absent",
    )
    where: list[WhereRule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _method_or_stages(self) -> Blend:
        if (self.method is None) == (self.stages is None):
            raise ValueError("write either method or stages")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The method parameters written flat beside ``method``."""
        return dict(self.model_extra or {})


class Output(_Section):
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


_DENSITIES = {"gradient": 0.1, "child_f": 0.3, "child_d": 0.3}


class FinetuneJob(_Section):
    """How one expert is made. Defaults: tuning for text models of up to a few billion parameters."""

    data: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1, description="JSONL, JSON or parquet")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    image_root: str | None = Field(
        None, min_length=1, description="folder of the images that rows name; default: where each data file is"
    )
    eval_upstream: str | None = Field(None, description="same formats; its loss is logged while training")
    eval_downstream: str | None = Field(None, description="same formats; its loss is logged while training")
    train: Annotated[str, BeforeValidator(_as_sum)] = Field("full", description=training.HELP)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="instead of epochs")
    batch_size: int = Field(8, ge=1, description="samples per device and forward pass")
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-5, gt=0, lt=1, description="with an adapter, its family's by default")
    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=dict, description="{what, as `train` names it: rate}, first match wins; elsewhere learning_rate"
    )
    adapter: Annotated[adapters.Adapter | None, BeforeValidator(adapters.adapter_of)] = Field(
        None, description="trained in place of the weights: lora, dora, prompt, ...; `train` says where, llm by default"
    )
    select: Literal["none", "magnitude", "gradient", "fused", "random", "child_f", "child_d", "half"] = Field(
        "none",
        description="which elements of what is trained move: the smallest pre-trained weights, the largest accumulated "
        "gradients, both (SPIDER), chance, Child-Tuning F or D, half of the maps of every block",
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the elements that move; default: magnitude and random 0.5, gradient 0.1, child_f and "
        "child_d 0.3, fused by its own rule (where the gradient stands higher than the weight)",
    )
    every: int | None = Field(
        None, ge=1, description="steps between selections; default: child_f 1, others select once"
    )
    scope: Literal["tensor", "global"] | None = Field(
        None, description="where the share is counted: in each tensor, or over all (default of gradient and child_d)"
    )
    mask: Literal["hard", "soft"] = Field(
        "hard", description="soft: after every step each element goes back to the base by how little it matters"
    )
    select_samples: int = Field(64, ge=1, description="training samples whose gradients make the first selection")
    l2_sp: float = Field(0.0, ge=0, allow_inf_nan=False, description="strength of the pull back to the base (L2-SP)")
    fisher: str | None = Field(
        None, min_length=1, description="statistics of the base with Fisher information: with l2_sp, EWC"
    )
    replay: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="upstream samples mixed into every batch; same formats as data"
    )
    replay_ratio: float = Field(0.25, gt=0, lt=1, description="their share of a batch, at least one sample")
    distill: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of learning from the frozen base (LwF)")
    distill_on: Literal["downstream", "replay", "both"] = Field(
        "both", description="whose answers the base's distributions are learned of"
    )
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="of the distributions, with distill")
    stop_upstream: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="stop when the loss on eval_upstream exceeds the base's by this, at the last evaluation before",
    )
    average: Literal["none", "ema", "lawa"] = Field("none", description="of the weights along the run")
    ema_decay: float = Field(0.999, gt=0, lt=1)
    lawa_window: int = Field(5, ge=1, description="snapshots whose mean is taken")
    lawa_every: int | None = Field(None, ge=1, description="steps between snapshots; default: a twentieth of the run")
    export: Literal["average", "last", "both"] = Field(
        "average", description="what is saved of a run that averages; both: the last weights as <out>-last"
    )
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, description="below 1: share of the steps; otherwise steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: gradients are measured, not clipped")
    max_length: int = Field(2048, ge=8, description="tokens; longer samples are dropped and counted, never cut")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass; masters are fp32"
    )
    activation_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "sgd", "lion", "lion_8bit"] = Field(
        "adamw", description="lion and those of 8 bits are bitsandbytes'"
    )
    offload_optimizer: bool = Field(False, description="keep the optimizer's state, and step, in the host's memory")
    optimizer_in_backward: bool = Field(
        False, description="step each tensor as soon as its gradient is there, so that no two gradients are held"
    )
    packing: bool = Field(False, description="put the samples of a batch end to end instead of padding them; text only")
    curriculum: Literal["none", "easy", "common", "shared"] = Field(
        "none",
        description="easy: samples in the order of the base's loss on them; common: of several data files, a task "
        "each, what the tasks have in common first; shared: of several experts, first a stage that all share",
    )
    shared_steps: float = Field(0.5, gt=0, lt=1, description="with curriculum: shared, the share of the steps it takes")
    shared_on: Literal["union", "common"] = Field(
        "union", description="with curriculum: shared, all data shuffled, or what the tasks have in common first"
    )
    group_by_length: bool = Field(False, description="make batches of samples of like length")
    show_samples: int = Field(2, ge=0, description="texts that the model writes at every evaluation, for a person")
    tensorboard: bool = Field(False, description="write what is logged as event files, too")
    log_every: int = Field(1, ge=1)
    eval_every: int | None = Field(None, ge=1, description="steps; default: a tenth of the run")
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between resumable checkpoints; default: a fifth of the run, five minutes apart at least",
    )
    save_dtype: Literal["float32", "bfloat16", "float16", "base"] = Field(
        "float32", description="of the expert's weights"
    )
    seed: int = Field(42, ge=0)

    @field_validator("train")
    @classmethod
    def _readable(cls, text: str) -> str:
        training.TrainExpression.parse(text)
        return text

    @field_validator("learning_rates")
    @classmethod
    def _readable_parts(cls, rates: dict[str, float]) -> dict[str, float]:
        for expression in rates:
            training.TrainExpression.parse(expression, "learning_rates")
        return rates

    @model_validator(mode="after")
    def _adapter_fits(self) -> FinetuneJob:
        if self.adapter is None:
            return self
        problem = adapters.conflict(self)
        if problem is not None:
            raise ValueError(problem)
        if "learning_rate" not in self.model_fields_set:
            self.__dict__["learning_rate"] = (
                self.adapter.family.rate
            )  # a default, not a setting: it goes with the family
        return self

    @model_validator(mode="after")
    def _selection_fits(self) -> FinetuneJob:
        given = {"density", "every", "scope", "mask", "select_samples"} & self.model_fields_set
        values = {key: getattr(self, key) for key in given}
        idle = [key for key in sorted(given) if values[key] != type(self).model_fields[key].default]
        if self.select == "none" and idle:
            raise ValueError(
                f"{idle[0]} needs select, one of magnitude, gradient, fused, random, child_f, child_d, half"
            )
        if self.select in ("magnitude", "child_d") and self.every is not None:
            raise ValueError(
                f"select {self.select} chooses once, so it takes no every; gradient and fused choose again"
            )
        if self.select == "half" and (self.density is not None or self.scope is not None):
            raise ValueError("select half takes half of the maps of every block, so it takes neither density nor scope")
        if self.mask == "soft" and self.select in ("random", "child_f", "child_d", "half"):
            raise ValueError(f"mask soft weighs elements, and select {self.select} has no weights; use hard")
        if self.select == "child_f" and self.scope is not None:
            raise ValueError("select child_f tosses a coin for every element, so it takes no scope")
        if self.select == "fused" and self.density is None and self.scope is not None:
            raise ValueError("select fused without density goes by a rule of its own, so it takes no scope")
        return self

    @model_validator(mode="after")
    def _keeping_fits(self) -> FinetuneJob:
        if self.fisher is not None and not self.l2_sp:
            raise ValueError("fisher weighs the pull to the base, so it needs l2_sp, its strength")
        for key, needed, there in (
            ("replay_ratio", "replay", bool(self.replay)),
            ("distill_on", "distill", self.distill > 0),
            ("temperature", "distill", self.distill > 0),
            ("ema_decay", "average: ema", self.average == "ema"),
            ("lawa_window", "average: lawa", self.average == "lawa"),
            ("lawa_every", "average: lawa", self.average == "lawa"),
            ("shared_steps", "curriculum: shared", self.curriculum == "shared"),
            ("shared_on", "curriculum: shared", self.curriculum == "shared"),
        ):
            if not there and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} needs {needed}, which is not given")
        if self.replay and self.batch_size < 2:
            raise ValueError(
                "replay puts upstream samples beside others into every batch, so it needs a batch_size of 2"
            )
        if self.distill and self.distill_on == "replay" and not self.replay:
            raise ValueError("distill_on replay needs replay, the samples to distill on")
        if self.stop_upstream is not None and self.eval_upstream is None:
            raise ValueError("stop_upstream watches the loss on eval_upstream, which is not given")
        if self.stop_upstream is not None and self.average != "none":
            raise ValueError("stop_upstream saves the weights of one evaluation, and average those of none; give one")
        if self.average == "none" and self.export != "average":
            raise ValueError(
                "export chooses between the average and the last weights, so it needs average: ema or lawa"
            )
        return self

    @model_validator(mode="after")
    def _memory_fits(self) -> FinetuneJob:
        stepwise = {
            "gradient_accumulation above 1": self.gradient_accumulation > 1,
            "select": self.select != "none",
            "l2_sp": self.l2_sp > 0,
            "offload_optimizer": self.offload_optimizer,
            "max_grad_norm (set it to null)": self.max_grad_norm is not None,
        }
        clash = next((key for key, given in stepwise.items() if given), None)
        if self.optimizer_in_backward and clash is not None:
            raise ValueError(
                f"optimizer_in_backward has no moment at which all gradients of a step are there, "
                f"so it cannot be had with {clash}"
            )
        if self.select != "none" and self.offload_optimizer:
            raise ValueError("select keeps moments of what moves only, where it moves; offload_optimizer moves all")
        if self.select == "child_f" and self.optimizer not in ("adamw", "sgd"):
            raise ValueError(
                f"select child_f lays moments to rest element by element, which optimizer {self.optimizer} cannot do; "
                "use adamw or sgd"
            )
        if self.packing and self.distill:
            raise ValueError("distill asks the base about whole samples, so it cannot be had with packing")
        if self.curriculum in ("easy", "common") and (self.replay or self.group_by_length):
            other = "replay" if self.replay else "group_by_length"
            raise ValueError(f"curriculum {self.curriculum} decides the order of samples, so it takes no {other}")
        if self.curriculum == "common" and len(self.data) < 2:
            raise ValueError("curriculum common takes each data file for a task, so it needs several; of one take easy")
        if self.curriculum == "shared" and self.max_steps is None:
            raise ValueError("curriculum shared divides the steps between two stages, so it needs max_steps")
        if self.group_by_length and self.replay:
            raise ValueError("replay decides what is in a batch, so it cannot be had with group_by_length")
        return self

    @property
    def samples_a_step(self) -> int:
        """Samples of all batches of one optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def adapted_part(self) -> str:
        """Where an adapter is attached: what ``train`` names, the language model by default."""
        own_place = "connector" if self.adapter is not None and self.adapter.name == "visual-prompt" else "llm"
        return own_place if self.train == "full" else self.train

    @property
    def replayed(self) -> int:
        """Replayed samples of each batch."""
        return min(self.batch_size - 1, max(1, round(self.replay_ratio * self.batch_size))) if self.replay else 0

    @property
    def selected_density(self) -> float:
        """The share of elements that move, defaults filled in; of ``half`` and ``fused`` by its own rule about half."""
        return self.density or _DENSITIES.get(self.select, 0.5)

    @property
    def selects_every(self) -> int:
        """Steps between selections; 0: only once."""
        return self.every or (1 if self.select == "child_f" else 0)

    @property
    def selection_scope(self) -> Literal["tensor", "global"]:
        """Where the share is counted, default filled in."""
        return self.scope or ("global" if self.select in ("gradient", "child_d") else "tensor")

    @property
    def selects_by_gradient(self) -> bool:
        """Whether gradients decide what moves."""
        return self.select in ("gradient", "fused", "child_d")


class Finetune(_Section):
    """The making of the experts; `ktmerge finetune` and `ktmerge run` read it."""

    experts: dict[str, FinetuneJob] = Field(min_length=1, description="keyed by the expert's name")


class Evaluation(_Section):
    """What is scored: a suite file, or tasks written here."""

    suite: str | None = None
    upstream: list[Task] = Field(default_factory=list)
    downstream: list[Task] = Field(default_factory=list)
    batch_size: int | None = Field(None, ge=1, description="sequences in a forward pass; by default what fits")
    bootstrap: int = Field(2000, ge=100, le=1_000_000, description="resamples behind each interval")
    seed: int = Field(0, ge=0, description="of the bootstrap")

    @model_validator(mode="after")
    def _suite_or_tasks(self) -> Evaluation:
        if (self.suite is None) == (not self.upstream and not self.downstream):
            raise ValueError("write either suite or tasks under upstream and downstream")
        return self


_EXPERT_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class Recipe(_Section):
    """base + experts + blend -> one checkpoint; optionally how the experts were made and what is scored."""

    ktmerge: Literal[1] = Field(description="schema version")
    name: str = Field("recipe", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = Field("", description="one line: when to use it")
    base: str | None = Field(None, description="a folder (relative to the recipe) or a hub id, `org/name@revision`")
    experts: dict[str, Expert] = Field(default_factory=dict)
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
            if name == "base" or not _EXPERT_NAME.match(name):
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
