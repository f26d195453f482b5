"""Which tensors of a model an adapter's names mean, and how their factors lie to them. Reads no weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.alignment import locate
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import FLOATS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.limits import is_finite
from ktmerge.checkpoints.matrices import matrix_layout
from ktmerge.checkpoints.tying import tied_head, ties
from ktmerge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "base_model.model."
_PATTERN_SECONDS = 1.0
_ROWS = re.compile(r"(\.token_adapter)?\.trainable_tokens_delta$")
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<leaf>weight|bias))?$"
)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_FOREIGN = re.compile(r"(^|\.)(lora_|ia3_|hada_|lokr_|oft_|vera_|boft_|prompt_|adaption_|token_adapter|ranknum)")


@dataclass(frozen=True)
class Grid:
    """Some rows and columns of a matrix of a tensor in memory, ``[o, i]``, or one of a stack ``[E, o, i]``.

    ``turned``: they lie in the file with a column as a row.
    """

    matrix: int
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    turned: bool


@dataclass(frozen=True)
class Block:
    """Where a part of a tensor in memory lies: in the file's tensor ``name``, from element ``begin`` on, row by row.

    Without a ``grid`` it is all of it, as it is.
    """

    name: str
    begin: int = 0
    grid: Grid | None = None


@dataclass(frozen=True)
class Held:
    """A tensor in memory: its shape, and where all of it lies in the files."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class AdaptedModule:
    """The adapted weight or bias of one module: where it lies, and the adapter's tensors.

    Attributes:
        name: the adapter's name of it.
        shape: of the tensor in memory.
        factors: the adapter's tensors.
        scale: of their product.
        outputs_are_rows: whether an output is a row of the tensor, or of each matrix.
        blocks: where it lies in the model's files.
        is_stack: whether it is a stack of matrices, each with factors of its own.
        tied: the factors of a head that is this embedding: the embedding's, transposed and the other way round.
    """

    name: str
    shape: tuple[int, ...]
    factors: Mapping[str, TensorInfo]
    scale: float
    outputs_are_rows: bool
    blocks: tuple[Block, ...]
    is_stack: bool = False
    tied: tuple[TensorInfo, ...] = ()

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias beside the second factor, added to the module's own."""
        return "lora_B.bias" in self.factors

    @property
    def pair(self) -> tuple[TensorInfo, TensorInfo]:
        """A ``[r, in]`` and B ``[out, r]``."""
        kind = "lora_embedding" if "lora_embedding_A" in self.factors else "lora"
        return self.factors[f"{kind}_A"], self.factors[f"{kind}_B"]


@dataclass(frozen=True)
class TrainedRows:
    """Single rows of a table: ``values [n, width]`` in place of those at ``indices``."""

    values: TensorInfo
    indices: Sequence[int]


def understand(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo], model: Checkpoint
) -> tuple[list[AdaptedModule], dict[str, TensorInfo], dict[str, TrainedRows]]:
    """The modules to fold, the tensors stored whole, and the rows stored of others, by the model's names.

    Args:
        folder: the adapter's.
        config: its ``adapter_config.json``.
        stored: its tensors, by the names of the modules in the model.
        model: what it is folded into.

    Raises:
        UsageError: a tensor is no part of LoRA or DoRA, or the model has no such module.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    rows: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        match = _FACTOR.match(name)
        if _is_second_copy(name, stored):
            continue
        if info.dtype not in FLOATS:
            raise UsageError(f"{folder}: the adapter's '{name}' is of type {info.dtype}; save it unquantised.")
        if match is not None:
            kind = match["kind"] + (".bias" if match["leaf"] == "bias" else "")
            factors.setdefault(match["module"], {})[kind] = info
        elif _ROWS.search(name):
            rows[_ROWS.sub(".weight", name)] = info
        elif _FOREIGN.search(name):
            raise UsageError(
                f"{folder}: the adapter's tensor '{name}' is no part of LoRA or DoRA; it cannot be folded."
            )
        else:
            whole[_bare(name)] = info
    if not factors and not whole and not rows:
        raise UsageError(f"{folder}: the adapter has no tensors.")
    known = _Known(folder, model)
    parameters = _parameters(folder, config, factors, known)
    targets = {module: parameters.get(module, f"{module}.weight") for module in factors}
    biases = [f"{module}.bias" for module, found in factors.items() if "lora_B.bias" in found]
    places = known.find([*targets.values(), *biases, *whole, *rows])
    if any(name in places for name in rows) and ties(model.config):  # PEFT stores those of the table twice then
        rows = {name: info for name, info in rows.items() if name in places or not HEAD.search(name)}
    lost = [name for name in (*targets.values(), *biases, *rows) if name not in places]
    head, table = _tied(config, factors, lost)
    if head:
        lost.remove(f"{head}.weight")
        whole.pop(f"{head}.weight", None)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        reason = "does not have; it belongs to another model"
        if HEAD.search(lost[0]) and ties(model.config):
            reason = "ties to its embedding and does not store; untie the model first"
        raise UsageError(f"{folder}: the adapter changes '{lost[0]}'{more}, which {model.root} {reason}.")
    # A head that the model ties to its embedding is no tensor of its own; the alignment judges what is left over.
    replaced = {known.alone(places[name], name) if name in places else name: info for name, info in whole.items()}
    sideways = _Orientation(config, model)
    modules = []
    for module, found in factors.items():
        if module == head:
            continue
        target, held = targets[module], places[targets[module]]
        own = replaced.get(held.blocks[0].name)
        shape = held.shape if own is None else own.shape
        is_stack = module in parameters and len(shape) == 3
        said = target if module in parameters else module
        scale = _scale(folder, config, said, found, shape[0] if is_stack else 1)
        if config.get("use_dora") and "lora_magnitude_vector" not in found:
            raise UsageError(
                f"{folder}: the adapter's config says DoRA (use_dora), but it has no lora_magnitude_vector of "
                f"'{module}'; it is not whole."
            )
        bias = found.pop("lora_B.bias", None)
        tied = (factors[head]["lora_B"], factors[head]["lora_A"]) if module == table else ()
        if tied and scale != _scale(folder, config, head, factors[head]):
            raise UsageError(f"{folder}: the adapter scales '{head}' and '{table}', which are one, differently.")
        outputs_are_rows = not sideways.of(held, found, is_stack)
        modules.append(AdaptedModule(target, shape, found, scale, outputs_are_rows, held.blocks, is_stack, tied))
        if bias is not None:
            beside = places[f"{module}.bias"]
            modules.append(
                AdaptedModule(f"{module}.bias", beside.shape, {"lora_B.bias": bias}, scale, True, beside.blocks)
            )
    trained = {
        known.alone(places[name], name): TrainedRows(info, _indices(folder, config, name, info))
        for name, info in rows.items()
    }
    changed = {*replaced, *(block.name for module in modules for block in module.blocks)}
    _require_alone(folder, trained, changed, model)
    tied_to = tied_head(model)
    if tied_to is not None and tied_to[1] in trained:
        trained.setdefault(tied_to[0], trained[tied_to[1]])
    return modules, replaced, trained


class _Known:
    """The model's tensors by their names in its files, and in memory for names that are not there."""

    def __init__(self, folder: Path, model: Checkpoint) -> None:
        self._folder = folder
        self._model = model

    def find(self, wanted: Iterable[str]) -> dict[str, Held]:
        """Where the tensors of these names lie; what is nowhere is left out."""
        wanted = list(wanted)
        places = locate(self._model.tensors, wanted, str(self._folder))
        found = {name: Held(self._model[place].shape, (Block(place),)) for name, place in places.items()}
        lost = [name for name in wanted if name not in found]
        if not lost or (ties(self._model.config) and all(HEAD.search(name) for name in lost)):
            return found
        return found | {name: self._held[place] for name, place in locate(self._held, lost, str(self._folder)).items()}

    def alone(self, held: Held, name: str) -> str:
        """The file's tensor that is the one in memory, which the adapter stores whole."""
        (block, *others) = held.blocks
        if others or block.grid is not None or held.shape != self._model[block.name].shape:
            raise UsageError(
                f"{self._folder}: the adapter stores '{name}' whole, which the model's files have in other pieces; "
                "merge it with PEFT."
            )
        return block.name

    @cached_property
    def _held(self) -> Mapping[str, Held]:
        from ktmerge.checkpoints.held import held_tensors

        return held_tensors(self._model)


def _parameters(
    folder: Path, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, TensorInfo]], known: _Known
) -> dict[str, str]:
    """The tensors that are adapted themselves (``target_parameters``), by the modules that factors are stored under.

    PEFT puts one wrapper around a module for each of its parameters: ``experts``, ``experts.base_layer`` and so on;
    which is whose is told by the shapes.
    """
    told = config.get("target_parameters") or []
    if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
        raise UsageError(f"{folder}: the adapter's target_parameters are no list of names.")
    wrappers: dict[str, list[str]] = defaultdict(list)
    for module in factors:
        wrappers[module.replace(".base_layer", "")].append(module)
    leaves = {one.rpartition(".")[2] for one in told}
    names = [f"{owner}.{leaf}" for owner in wrappers for leaf in leaves]
    held = known.find(name for name in names if any(f".{name}".endswith(f".{one}") for one in told))
    found: dict[str, str] = {}
    for owner, modules in wrappers.items():
        own = {name: one.shape for name, one in held.items() if name.rpartition(".")[0] == owner}
        pairs = {
            module: name
            for module in modules
            for name in own
            if [name] == [other for other, shape in own.items() if _may_be(factors[module], shape)]
        }
        if own and (len(pairs) < len(modules) or len(set(pairs.values())) < len(pairs)):
            raise UsageError(
                f"{folder}: the adapter's factors of '{owner}' do not tell which of its target_parameters they change; "
                "merge it with PEFT."
            )
        found |= pairs if own else {}
    return found


def _may_be(factors: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> bool:
    """Whether factors may make a matrix, or a stack of them, of that shape, turned or not."""
    sides = [*(factors[kind].shape for kind in ("lora_A", "lora_B") if kind in factors)]
    if any(len(one) != 2 for one in sides) or len(sides) != 2:
        return False
    return sorted((sides[0][1], sides[1][0])) == sorted(shape[-2:])


def _tied(
    config: Mapping[str, Any], factors: Mapping[str, Mapping[str, TensorInfo]], lost: list[str]
) -> tuple[str, str]:
    """The head that the model does not store and the embedding it is, adapted as one (``ensure_weight_tying``)."""
    heads = [module for module in factors if f"{module}.weight" in lost and HEAD.search(f"{module}.weight")]
    tables = [module for module, found in factors.items() if "lora_embedding_A" in found]
    if not config.get("ensure_weight_tying") or len(heads) != 1 or len(tables) != 1:
        return "", ""
    return (heads[0], tables[0]) if factors[heads[0]].keys() == {"lora_A", "lora_B"} else ("", "")


def _indices(folder: Path, config: Mapping[str, Any], name: str, info: TensorInfo) -> list[int]:
    """Which rows of a table ``trainable_token_indices`` means: a list, or lists by the last parts of module names."""
    key = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    told, module = config.get(key), f".{name.removesuffix('.weight')}"
    if isinstance(told, Mapping):
        told = next((value for key, value in told.items() if module.endswith(f".{key}")), None)
    if (
        not isinstance(told, list)
        or any(type(one) is not int or one < 0 for one in told)
        or (len(told),) != info.shape[:1]
    ):
        raise UsageError(f"{folder}: the adapter's {key} do not say which rows of '{name}' it has.")
    return told


def _require_alone(folder: Path, trained: Mapping[str, TrainedRows], others: set[str], model: Checkpoint) -> None:
    """Refuse rows that the model's tables do not have, and rows of what is changed otherwise, too."""
    for name, rows in trained.items():
        table = model[name]
        if name in others:
            raise UsageError(
                f"{folder}: the adapter changes '{name}', and single tokens of it again; merge it with PEFT."
            )
        if table.dtype not in FLOATS:
            raise UsageError(f"{folder}: the adapter trained tokens of '{name}', which is quantised in {model.root}.")
        if rows.values.shape[1:] != table.shape[1:] or max(rows.indices, default=0) >= table.shape[0]:
            raise UsageError(
                f"{folder}: the adapter trained tokens that '{name}' of {model.root} {list(table.shape)} lacks; "
                "resize the model first, as it was when it was trained."
            )


def _is_second_copy(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether PEFT wrote the tensor beside the one that counts, as it does with the tables of a grown vocabulary.

    A module of ``modules_to_save`` is then stored three times: under its own name and as ``modules_to_save`` as it was
    trained, and as ``original_module`` as it was before.
    """
    return ".original_module." in name or (".modules_to_save." in name and _bare(name) in stored)


def _bare(name: str) -> str:
    """A tensor's name without the wrappers that PEFT puts around its module."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _scale(
    folder: Path, config: Mapping[str, Any], module: str, factors: Mapping[str, TensorInfo], experts: int = 1
) -> float:
    """alpha / r, or alpha / sqrt(r), with the alpha of the first pattern that matches; r as it is stored."""
    kind = "lora_embedding" if "lora_embedding_A" in factors else "lora"
    first, second = factors.get(f"{kind}_A"), factors.get(f"{kind}_B")
    if first is None or second is None:
        raise UsageError(f"{folder}: the adapter has only one factor of '{module}'; it is not whole.")
    rank = first.shape[0] if first.shape else 0
    alpha = _setting(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    told = _setting(folder, config, "rank_pattern", module, config.get("r"))
    stored, rank = rank, rank // max(experts, 1)
    if rank < 1 or len(second.shape) < 2 or second.shape[1] != stored or told != rank or rank * experts != stored:
        raise UsageError(
            f"{folder}: the adapter's factors of '{module}' have shapes {list(first.shape)} and {list(second.shape)}, "
            f"which do not make the rank {told} of its config."
        )
    if not is_finite(alpha):
        raise UsageError(f"{folder}: the adapter's lora_alpha for '{module}' is {repr(alpha)}, not a number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise UsageError(f"{folder}: the adapter's {key} is no map from patterns to numbers.")
    return next((value for pattern, value in patterns.items() if _means(folder, key, pattern, module)), default)


def _means(folder: Path, key: str, pattern: str, module: str) -> bool:
    """Whether a pattern of an adapter's config, which may be a stranger's, means the module, as PEFT reads it."""
    import regex

    try:
        return regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS) is not None
    except regex.error as error:
        raise UsageError(f"{folder}: the adapter's {key} has the pattern {pattern!r}: {error}.") from None
    except TimeoutError:
        raise UsageError(f"{folder}: the adapter's {key} has the pattern {pattern!r}, which takes for ever.") from None


class _Orientation:
    """Which weights are stored ``[in, out]``, as GPT-2 does: told by shape, and where square by the model's others."""

    def __init__(self, config: Mapping[str, Any], model: Checkpoint) -> None:
        self._said = config.get("fan_in_fan_out") is True
        self._model = model

    def of(self, held: Held, factors: Mapping[str, TensorInfo], is_stack: bool) -> bool:
        if "lora_embedding_A" in factors:
            return True
        target = held.blocks[0].name
        shape = held.shape[1:] if is_stack else held.shape
        inputs, outputs = factors["lora_A"].shape[1:2], factors["lora_B"].shape[:1]
        if len(shape) != 2 or shape[0] != shape[1]:
            return len(shape) == 2 and shape == (*inputs, *outputs)
        if is_stack:
            layout = matrix_layout(target, held.shape, self._model.config)
            return layout is not None and layout.transposed
        stack = re.match(r".*\.\d+\.|", target)
        votes = {
            bias.shape[0] == info.shape[1]
            for name, info in self._model.tensors.items()
            if name.startswith(stack[0] if stack else "") and name.endswith(".weight") and len(info.shape) == 2
            if info.shape[0] != info.shape[1]
            and (bias := self._model.tensors.get(name.removesuffix("weight") + "bias")) is not None
            and len(bias.shape) == 1
        }
        return votes.pop() if len(votes) == 1 else self._said


def fits(module: AdaptedModule) -> bool:
    """Whether the factors make a tensor of the module's shape, and a magnitude has all it needs where it is cut."""
    if module.is_bias:
        return module.shape == module.factors["lora_B.bias"].shape
    shape = module.shape[1:] if module.is_stack else module.shape
    first, second = (info.shape for info in module.pair)
    # Of a convolution, the second factor is one of size 1 in every direction.
    if len(first) != len(second) or any(size != 1 for size in second[2:]):
        return False
    product = (second[0], *first[1:])
    magnitude = module.factors.get("lora_magnitude_vector")
    if magnitude is not None and (math.prod(magnitude.shape) != second[0] or not _has_whole_outputs(module)):
        return False
    return shape == (product if module.outputs_are_rows else product[::-1])


def _has_whole_outputs(module: AdaptedModule) -> bool:
    """Whether each piece that lies in a file has all inputs of its outputs."""
    for grid in (block.grid for block in module.blocks if block.grid is not None):
        if (len(grid.columns), len(grid.rows))[not module.outputs_are_rows] != module.shape[module.outputs_are_rows]:
            return False
    return True
