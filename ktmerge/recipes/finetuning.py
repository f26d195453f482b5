"""How experts are made: the finetune section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ktmerge.recipes import adapters, training
from ktmerge.recipes.section import Section, as_list, as_sum

_DENSITIES = {"gradient": 0.1, "child_f": 0.3, "child_d": 0.3}


class FinetuneJob(Section):
    """How one expert is made. Defaults: tuning for text models of up to a few billion parameters."""

    data: Annotated[list[str], BeforeValidator(as_list)] = Field(min_length=1, description="JSONL, JSON or parquet")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    image_root: str | None = Field(
        None, min_length=1, description="folder of the images that rows name; default: where each data file is"
    )
    eval_upstream: str | None = Field(None, description="same formats; its loss is logged while training")
    eval_downstream: str | None = Field(None, description="same formats; its loss is logged while training")
    train: Annotated[str, BeforeValidator(as_sum)] = Field("full", description=training.HELP)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="instead of epochs")
    batch_size: int = Field(8, ge=1, description="samples per device and forward pass")
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-5, gt=0, lt=1, description="with an adapter, its family's by default")
    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}, description="{what, as `train` names it: rate}, first match wins; elsewhere learning_rate"
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
    l2_sp: float = Field(0.0, ge=0, description="strength of the pull back to the base (L2-SP)")
    fisher: str | None = Field(
        None, min_length=1, description="statistics of the base with Fisher information: with l2_sp, EWC"
    )
    replay: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="upstream samples mixed into every batch; same formats as data"
    )
    replay_ratio: float = Field(0.25, gt=0, lt=1, description="their share of a batch, at least one sample")
    distill: float = Field(0.0, ge=0, description="weight of learning from the frozen base (LwF)")
    distill_on: Literal["downstream", "replay", "both"] = Field(
        "both", description="whose answers the base's distributions are learned of"
    )
    temperature: float = Field(2.0, gt=0, description="of the distributions, with distill")
    stop_upstream: float | None = Field(
        None,
        ge=0,
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
    seed: int = Field(42, ge=0, lt=2**32)

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


class Finetune(Section):
    """The making of the experts; `ktmerge finetune` and `ktmerge run` read it."""

    experts: dict[str, FinetuneJob] = Field(min_length=1, description="keyed by the expert's name")
