"""Which part of a model a tensor belongs to (a language-model layer, the vision tower, the connector, ...), from names.

Resolved by structure: numbered block containers are found in the names, and the path to each says whose they are.
There is no table of architectures; the config only helps to tell towers apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.expressions import PARTS, PartExpression
from ktmerge.errors import UsageError

Tower = Literal["llm", "vision", "audio", "encoder", "connector"]

_VISION = re.compile(
    r"vision|visual|image|^img|_img|video|vqmodel|^vpm$|^vit$|(^|_)(vit|clip|siglip|dinov?\d*|sam|swin)(_|$)|^pixel",
    re.I,
)
_AUDIO = re.compile(r"audio|speech|^apm$|sound", re.I)
_TEXT = re.compile(r"language|(^|_)text|^llm$|^lm$|^llama$", re.I)
_CONNECTOR = re.compile(
    r"(?<!vocab_)projector|connector|merger|aligner|resampler|perceiver|q_?former|abstractor|newline|view_sep|multi_modal|^mm_|"
    r"^(visual|vision|image|img|text|language|audio|speech|modality|mlp|image_to_text)_proj(ection)?(_up|_down)?$|"
    r"^(up|down)_proj_for_|^embed_(vision|audio)$|^(visual_embeddings_table|vte)$|"
    r"^vision_adapter$|^mlp1$|^query_tokens$|^t2i|^i2t|(^|_)logit_(scale|bias)$",
    re.I,
)
_NUMBER = re.compile(r"^\d{1,5}$")
_CONTAINER = re.compile(r"^(layers?|blocks?|h|resblocks|stages?|encoder_layers|decoder_layers|transformer_blocks)$")
_EMBED = re.compile(r"embed(?!ding_norm$)|^wte$|^wpe$|^shared$|^relative_attention_bias$", re.I)
# The table of the tokens: where there is one, there is a language model.
_TOKENS = re.compile(
    r"(^|\.)((embed_tokens|wte|(word|tok|token)_emb(edding)?s?|embed_in|shared)|"
    r"(backbone|rwkv|model|transformer)\.embeddings?)\.(weight|embedding)$"
)
_HEAD = re.compile(
    r"^(lm_heads?|embed_out|output|output_layer|classifier|score|head|heads|cls|qa_outputs|proj_out|fc|pooler|out_proj)$|"
    r"_(head|classifier)$|^(dense_)?prediction|^vocab_(transform|layer_norm|projector)$",
    re.I,
)
_NORM = re.compile(r"norm|^ln(_|$)|_ln$|^ln\d", re.I)
_WRAPPER = frozenset({"model", "transformer", "backbone", "base_model", "encoder", "decoder"})
_TEXT_SECTIONS = frozenset({"text_config", "llm_config", "language_config"})
_SIGHT_SECTIONS = frozenset({"vision_config"})
_SIGHT = frozenset({"image_size", "patch_size", "num_channels", "backbone_config"})
_HEARING = frozenset({"num_mel_bins", "feat_extract_norm", "audio_channels", "sampling_rate"})
_ENCODERS = frozenset({"encoder"})
_DECODERS = frozenset({"decoder"})


class Parts:
    """The parts of one checkpoint.

    Every tensor belongs to exactly one of: ``llm.layers[i]``, ``embed``, ``head``, ``norm`` (the final one) and ``llm``
    (the rest of the language model); ``vision.layers[i]`` and ``vision``; ``audio.layers[i]`` and ``audio``;
    ``encoder.layers[i]`` and ``encoder`` (of encoder-decoder models, whose decoder counts as the language model);
    ``connector`` (what joins two towers); ``vision.head`` (a classifier on a pure vision model; on a pure
    audio model ``head``); ``other``.

    Args:
        source: a checkpoint, or its tensor names.
        config: ``config.json``, when names are given.
    """

    def __init__(self, source: Checkpoint | Iterable[str], config: Mapping[str, Any] | None = None) -> None:
        names = list(source.tensors if isinstance(source, Checkpoint) else source)
        self._config = source.config if isinstance(source, Checkpoint) and config is None else dict(config or {})
        blocks = _find_blocks(names)
        tables = [name for name in names if _TOKENS.search(name)]
        towers = self._settle(_find_towers(names, blocks, tables), blocks, tables)
        stacks = _main_stacks(towers, blocks)
        roots = _language_roots(stacks)
        multimodal = len({tower for tower in towers.values() if tower not in ("connector", "encoder")}) > 1
        self._parts: dict[str, str] = {}
        for name, tower in towers.items():
            block = blocks.get(name)
            if block is not None and stacks.get(tower) == block[0]:
                self._parts[name] = f"{tower}.layers[{block[1]}]"
            elif tower == "encoder" and name in tables:
                self._parts[name] = "embed"
            elif tower == "llm":
                self._parts[name] = _language_rest(name, block is not None, roots, multimodal)
            elif tower in ("vision", "audio") and "llm" not in stacks and _has(_HEAD, name):
                self._parts[name] = "vision.head" if tower == "vision" else "head"
            else:
                self._parts[name] = tower
        self.layers: dict[str, int] = _count_layers(self._parts.values())

    def of(self, name: str) -> str:
        """The part of the tensor ``name``; ``other`` for a name the checkpoint doesn't have."""
        return self._parts.get(name, "other")

    def names(self) -> tuple[str, ...]:
        """What an expression may say for this model: every part that has tensors, without layer numbers."""
        found = {part.partition("[")[0] for part in self._parts.values()}
        found |= {part.partition(".")[0] for part in found}
        if found & {"embed", "head", "norm"}:
            found.add("llm")
        if "vision.head" in found:
            found = (found - {"vision.head"}) | {"head"}
        order = {name: position for position, name in enumerate(PARTS)}
        return tuple(sorted(found, key=lambda part: (order[part.partition(".")[0]], part)))

    def matcher(self, expression: str) -> Callable[[str], bool]:
        """A test for tensor names: does the tensor belong to the parts the expression names?

        Raises:
            UsageError: the expression is malformed, or matches no tensor of this model.
        """
        parsed = PartExpression.parse(expression)
        chosen = {part for part in set(self._parts.values()) if parsed.matches(part, self.layers)}
        if not chosen:
            counts = "".join(f", {tower}.layers[0:{count}]" for tower, count in self.layers.items())
            raise UsageError(
                f"part '{expression}' matches no tensor of this model; it has {', '.join(self.names())}{counts}."
            )
        return lambda name: self._parts.get(name, "other") in chosen

    def _settle(
        self, towers: dict[str, Tower], blocks: Mapping[str, tuple[str, int]], tables: list[str]
    ) -> dict[str, Tower]:
        """What one name can't tell: a model without a language model, an encoder beside a decoder."""
        kinds = set(towers.values()) - {"connector"}
        if kinds == {"vision"} or kinds == {"audio"}:
            return dict.fromkeys(towers, next(iter(kinds)))
        if not tables and not (self._declares_text() and _has_stack(towers, blocks)):
            # A head or a pooler beside a lone tower makes no language model, nor does a decoder of boxes or masks.
            lone = self._lone_tower(kinds)
            if kinds == {"llm"}:
                towers = dict.fromkeys(towers, lone)
            elif lone != "llm" or not _has_stack(towers, blocks):
                lone = lone if lone in kinds else "vision" if "vision" in kinds else "audio"
                towers = {name: lone if tower == "llm" else tower for name, tower in towers.items()}
        return _split_encoder(towers, blocks, bool(self._config.get("is_encoder_decoder")))

    def _declares_text(self) -> bool:
        # BEiT's vocabulary is of pictures, wav2vec's of letters that it hears.
        vocabulary = "vocab_size" in self._config and not _declares(self._config, _SIGHT | _HEARING)
        return vocabulary or _declares(self._config, _TEXT_SECTIONS)

    def _lone_tower(self, kinds: set[Tower]) -> Tower:
        """What a model without a table of tokens is: the config says what it is given."""
        if "num_mel_bins" in self._config:
            return "audio"  # a spectrogram's patches are no picture's
        if _declares(self._config, _SIGHT) or ("vision" in kinds and _declares(self._config, _SIGHT_SECTIONS)):
            return "vision"
        hears = _declares(self._config, _HEARING) or _AUDIO.search(str(self._config.get("model_type", "")))
        return "audio" if hears else "llm"


def _declares(config: Mapping[str, Any], keys: frozenset[str]) -> bool:
    return not keys.isdisjoint(config)


def _has_stack(towers: Mapping[str, Tower], blocks: Mapping[str, tuple[str, int]]) -> bool:
    return any(tower == "llm" and name in blocks for name, tower in towers.items())


def _find_towers(
    names: Iterable[str], blocks: Mapping[str, tuple[str, int]], tables: Iterable[str]
) -> dict[str, Tower]:
    """Whose each tensor is, judged by the path down to its block, or all of its path without one."""
    # What the table of the tokens is in, too, is no tower: `visual_bert.embeddings.word_embeddings`.
    wholes = {table.partition(".")[0] for table in tables}
    wholes = {whole for whole in wholes if not _TEXT.search(whole) and not _CONNECTOR.search(whole)}
    towers = {}
    for name in names:
        block = blocks.get(name)
        path = (block[0] if block else name.rpartition(".")[0] or name).split(".")
        leaf = [] if block else [name.rpartition(".")[2]]
        towers[name] = _tower([*(path[1:] if path[0] in wholes else path), *leaf])
    return towers


def _tower(path: Iterable[str]) -> Tower:
    segments = list(path)
    if any(_CONNECTOR.search(segment) for segment in segments):
        return "connector"
    # The first hint decides: `vision_model.text_prompt` is vision's, `text_model.vision_gate` is the text model's.
    for segment in segments:
        if _TEXT.search(segment):
            return "llm"
        if _AUDIO.search(segment):
            return "audio"
        if _VISION.search(segment):
            return "vision"
    return "llm"


def _find_blocks(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The block of each tensor that is in one: (container path, index).

    Of nested numbers the outermost under a container's usual name counts (``blocks.5.mlp.0`` is block 5); with no
    usual name on the path, the outermost list of at least two members of the same make.
    """
    names = list(names)
    members: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        segments = name.split(".")
        for position, segment in enumerate(segments):
            if _NUMBER.match(segment):
                members[".".join(segments[:position])][int(segment)].add(".".join(segments[position + 1 :]))
    alike = {
        container
        for container, items in members.items()
        if len(items) >= 2 and len(set(map(frozenset, items.values()))) == 1 and len(next(iter(items.values()))) >= 6
    }
    blocks: dict[str, tuple[str, int]] = {}
    for name in names:
        segments = name.split(".")
        numbers = [position for position, segment in enumerate(segments) if position and _NUMBER.match(segment)]
        paths = [(".".join(segments[:position]), int(segments[position])) for position in numbers]
        usual = [path for path in paths if _CONTAINER.match(path[0].rpartition(".")[2])]
        found = usual or [path for path in paths if path[0] in alike]
        if found:
            blocks[name] = found[0]
    return blocks


def _split_encoder(towers: dict[str, Tower], blocks: Mapping[str, tuple[str, int]], declared: bool) -> dict[str, Tower]:
    """Of a text model with an encoder and a decoder stack, call the encoder by its name; so, too, an encoder that
    stands beside what is named a language model, as Granite Speech's.
    """

    def side(name: str) -> frozenset[str]:
        return frozenset(name.split(".")[:-1]) & (_ENCODERS | _DECODERS)

    stacks = {blocks[name][0] for name, tower in towers.items() if tower == "llm" and name in blocks}
    sides = {(side(stack + "."), _has(_TEXT, stack)) for stack in stacks}
    kinds = {kind for kind, _ in sides}
    named = {(_ENCODERS, False), (frozenset(), True)} <= sides
    if not ({_ENCODERS, _DECODERS} <= kinds or named or (declared and _ENCODERS in kinds)):
        return towers
    return {name: "encoder" if tower == "llm" and side(name) == _ENCODERS else tower for name, tower in towers.items()}


def _main_stacks(towers: Mapping[str, Tower], blocks: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """The container of each tower's layers: the one with most members, the first by name if there are several."""
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for name, (container, index) in blocks.items():
        tower = towers[name]
        if tower != "connector":
            sizes[tower][container] = max(index + 1, sizes[tower].get(container, 0))
    return {tower: min(found, key=lambda path: (-found[path], path)) for tower, found in sizes.items()}


def _language_roots(stacks: Mapping[str, str]) -> tuple[str, ...]:
    """Module paths that belong to the language model as a whole, e.g. ``model.language_model``; bare wrappers don't."""
    container = stacks.get("llm", "")
    segments = container.split(".")[:-1]
    while segments and segments[-1] in _WRAPPER and len(segments) > 1:
        segments.pop()
    return (".".join(segments) + ".",) if segments and segments[-1] not in _WRAPPER else ()


def _language_rest(name: str, in_block: bool, roots: tuple[str, ...], multimodal: bool) -> str:
    """A tensor of the language model outside its main stack."""
    if in_block:
        return "llm"
    if _has(_HEAD, name):
        return "head"
    if _has(_EMBED, name):
        return "embed"
    segments = name.split(".")
    if any(_NORM.search(segment) for segment in segments[-2:]):
        return "norm"
    if "rotary_emb" in segments or not multimodal:
        return "llm"
    known = name.startswith(roots) if roots else False
    return "llm" if known or any(_TEXT.search(segment) for segment in segments) else "connector"


def _has(pattern: re.Pattern[str], name: str) -> bool:
    return any(pattern.search(segment) for segment in name.split("."))


def _count_layers(parts: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        tower, layered, index = part.partition(".layers[")
        if layered:
            counts[tower] = max(counts.get(tower, 0), int(index.rstrip("]")) + 1)
    return {tower: counts[tower] for tower in PARTS if tower in counts}
