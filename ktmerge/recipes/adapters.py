"""The `adapter:` of a fine-tune: which family, its settings, and what it can be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ktmerge.errors import did_you_mean
from ktmerge.recipes.section import Strict, as_list


@dataclass(frozen=True)
class Family:
    """What is known of a family before a model is loaded.

    Attributes:
        rate: learning rate by default, as its paper or its authors' code has it.
        takes: settings that mean something for it, beside ``name`` and ``keep``.
        rank, tokens: defaults.
        folds: whether the result is a change of dense weights.
        starts_as_base: whether an untrained adapter changes nothing.
        aligned: whether the model still gives one distribution for each token it is given.
    """

    rate: float
    takes: frozenset[str] = frozenset()
    rank: int = 16
    tokens: int = 20
    folds: bool = True
    starts_as_base: bool = True
    aligned: bool = True


_PAIR = frozenset({"rank", "alpha", "dropout", "modules", "b_rate"})
_CALIBRATED = _PAIR | {"orthogonal", "subspace", "sculpt"}
_TOKENS = frozenset({"tokens"})

FAMILIES: dict[str, Family] = {
    "lora": Family(1e-4, _CALIBRATED),
    "rslora": Family(1e-4, _CALIBRATED),
    "lora+": Family(1e-4, _CALIBRATED),
    "dora": Family(1e-4, _CALIBRATED),
    "pissa": Family(2e-5, _PAIR),
    "milora": Family(1e-4, _PAIR),
    "olora": Family(1e-4, _PAIR),
    "corda": Family(2e-5, _PAIR | {"data", "samples"}),
    "adalora": Family(1e-3, frozenset({"rank", "alpha", "dropout", "modules"})),
    "vera": Family(4e-3, frozenset({"rank", "dropout", "modules"}), rank=256),
    "fourierft": Family(3e-3, frozenset({"coefficients", "modules"})),
    "ia3": Family(3e-3, frozenset({"modules"})),
    "oft": Family(1e-4, frozenset({"block", "modules"})),
    "boft": Family(1e-4, frozenset({"block", "modules"})),
    "shira": Family(5e-4, frozenset({"rank", "modules"})),
    "prompt": Family(3e-2, _TOKENS, folds=False, starts_as_base=False, aligned=False),
    "p-tuning": Family(1e-3, _TOKENS, folds=False, starts_as_base=False, aligned=False),
    "prefix": Family(1e-2, _TOKENS, folds=False, starts_as_base=False),
    "llama-adapter": Family(9e-3, _TOKENS, tokens=10, folds=False),
    "xlora": Family(1e-4, frozenset({"experts"}), folds=False, starts_as_base=False),
    "bottleneck": Family(1e-4, frozenset({"rank"}), rank=64, folds=False),
    "conditioned": Family(1e-4, frozenset({"rank"}), rank=64, folds=False),
    "visual-prompt": Family(1e-3, _TOKENS, tokens=1, folds=False),
}
MOVING = ("pissa", "milora", "olora", "corda")
"""Those that begin at directions of the weights, and so change the weights below them."""
LORA_PLUS = 16.0
"""How many times A's rate B's is in LoRA+ (arXiv 2402.12354)."""


def _family(value: Any) -> Any:
    """Refuse what names no family, and settings where only a name goes."""
    if not isinstance(value, str) or value in FAMILIES:
        return value
    if value.lstrip().startswith("{"):
        raise ValueError(
            "takes the name of a family alone, e.g. lora; its settings go beside it, as --rank 8 or --set "
            "adapter.dropout=0.1, or all together as --set 'adapter={name: lora, rank: 8}'"
        )
    nearest = did_you_mean(value, FAMILIES, list_all=False).strip(" ?").replace("Did", "did")
    raise ValueError(f"should be one of {', '.join(FAMILIES)}{f' ({nearest})' if nearest else ''}")


class Adapter(Strict):
    """What is trained in place of the model's own weights. ``train`` says where it is attached."""

    name: Annotated[
        Literal[
            "lora", "rslora", "lora+", "dora", "pissa", "milora", "olora", "corda", "adalora", "vera", "fourierft",
            "ia3", "oft", "boft", "shira", "prompt", "p-tuning", "prefix", "llama-adapter", "xlora", "bottleneck",
            "conditioned", "visual-prompt",
        ],
        BeforeValidator(_family),
    ] = Field(description="the family")  # fmt: skip
    rank: int | None = Field(None, ge=1, description="of a low-rank change, or width of a bottleneck; default 16 or 64")
    alpha: float | None = Field(
        None, gt=0, description="scale: alpha / rank; default 2 * rank, or rank where it starts "
        "from singular vectors"
    )  # fmt: skip
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into the adapter")
    b_rate: float | None = Field(None, gt=0, description="B's learning rate as a multiple of A's; lora+: 16")
    modules: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="names of linear maps, e.g. [q_proj, v_proj]; default: all that `train` names"
    )
    tokens: int | None = Field(None, ge=1, description="length of a prompt; default 20, llama-adapter 10, visual 1")
    coefficients: int = Field(1000, ge=1, description="fourierft: learned entries of each map's spectrum")
    block: int = Field(32, ge=2, description="oft, boft: size of an orthogonal block; must divide the maps' inputs")
    data: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="corda: upstream samples whose directions are kept"
    )
    samples: int = Field(256, ge=1, description="corda: how many of them are used, drawn by the seed")
    experts: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="xlora: folders of the LoRA adapters that are routed between"
    )
    orthogonal: float = Field(0.0, ge=0, description="strength of the pull of A and B out of `subspace` (CLoRA)")
    subspace: Literal["principal", "random"] = Field(
        "principal", description="the `rank` largest singular directions of each map, or as many random ones"
    )
    sculpt: float = Field(0.0, ge=0, description="strength of LoRASculpt's penalty on change where weights are large")
    keep: bool = Field(False, description="keep the adapter beside the folded model, as <out>-adapter")

    @property
    def family(self) -> Family:
        """What is known of it."""
        return FAMILIES[self.name]

    @property
    def used_rank(self) -> int:
        """The rank, default filled in."""
        return self.rank or self.family.rank

    @property
    def used_tokens(self) -> int:
        """The length of a prompt, default filled in."""
        return self.tokens or self.family.tokens

    @property
    def prompt_length(self) -> int:
        """Tokens of the model's context that a prompt before the text takes."""
        return self.used_tokens if self.name in ("prompt", "p-tuning", "prefix") else 0

    @property
    def used_alpha(self) -> float:
        """Alpha, default filled in; what starts from singular vectors begins at their own scale."""
        return self.alpha or self.used_rank * (1.0 if self.name in MOVING else 2.0)

    @property
    def used_b_rate(self) -> float:
        """B's rate over A's, default filled in."""
        return self.b_rate or (LORA_PLUS if self.name == "lora+" else 1.0)

    @model_validator(mode="after")
    def _settings_fit(self) -> Adapter:
        for key, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True)
            if key not in {"name", "keep", *self.family.takes} and getattr(self, key) != default:
                takers = ", ".join(name for name, family in FAMILIES.items() if key in family.takes)
                raise ValueError(f"{self.name} takes no {key}; that is for {takers}")
        if self.name == "corda" and not self.data:
            raise ValueError("corda keeps the directions of upstream samples, so it needs data, files with some")
        if self.name == "xlora" and len(self.experts) < 2:
            raise ValueError("xlora routes between LoRA adapters, so it needs experts, two folders of them or more")
        if self.subspace != "principal" and not self.orthogonal:
            raise ValueError("subspace needs orthogonal, the strength of the pull out of it")
        if self.orthogonal and self.sculpt:
            raise ValueError("orthogonal and sculpt are two penalties for the same adapter; give one")
        if self.keep and not self.family.folds:
            raise ValueError(f"{self.name} cannot be folded, so the adapter is the result anyway; leave keep out")
        return self


def adapter_of(value: Any) -> Any:
    """``adapter: lora`` for ``adapter: {name: lora}``."""
    if value is not None and not isinstance(value, (str, Mapping, Adapter)):
        raise ValueError("takes the name of a family, or that and its settings, e.g. {name: lora, rank: 8}")
    return {"name": value} if isinstance(value, str) else value


def conflict(job: Any) -> str | None:
    """Why a fine-tune's adapter cannot be combined with its other settings; None if it can.

    Args:
        job: a ``FinetuneJob`` with an adapter.
    """
    adapter: Adapter = job.adapter
    if job.train != "full" and adapter.name in ("prompt", "p-tuning", "prefix", "xlora", "visual-prompt"):
        return f"train says where an adapter is attached, and {adapter.name} has a place of its own; leave train out"
    if job.select != "none":
        return "select chooses elements of the model's own weights, which an adapter leaves alone; give one of the two"
    if job.l2_sp:
        return (
            "l2_sp pulls the model's own weights to the base, and an adapter leaves them there; use replay, distill, "
            "adapter.orthogonal or adapter.sculpt"
        )
    if job.export == "both":
        return "export both saves two models, and an adapter is folded once; choose average or last"
    if job.stop_upstream is not None and not adapter.family.starts_as_base:
        return (
            f"stop_upstream measures from the first evaluation, and an untrained {adapter.name} is not the base; "
            "use replay instead"
        )
    if job.distill and not (adapter.family.starts_as_base and adapter.family.aligned):
        return f"distill learns from a frozen copy of the start, and an untrained {adapter.name} is not the base"
    if job.packing and adapter.name in ("prompt", "p-tuning", "prefix", "xlora", "conditioned"):
        return f"packing puts samples end to end, and {adapter.name} looks at where a sample begins; leave packing out"
    if job.optimizer_in_backward and (adapter.orthogonal or adapter.sculpt or adapter.name == "adalora"):
        return "optimizer_in_backward steps before the penalty's gradients are there; leave it out"
    if job.activation_checkpointing and adapter.name in ("prefix", "xlora"):
        return f"activation_checkpointing computes layers twice, which {adapter.name} cannot; leave it out"
    return None
