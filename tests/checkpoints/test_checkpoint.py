"""Opening checkpoint folders: what is found, what is carried, and every way in which a folder can lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letters import LETTERS
from safetensors.numpy import save_file

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.experts import fit_experts
from ktmerge.checkpoints.reader import TensorReader
from ktmerge.errors import KtmergeError, UsageError

MakeCheckpoint = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def test_one_file(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(files={"tokenizer.json": "{}", "sub/processor.py": "pass", ".gitattributes": "x"})
    checkpoint = Checkpoint.open(root)
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.index_file is None
    assert checkpoint.config == {"vocab_size": 12}
    assert checkpoint.other_files == ("config.json", "sub/processor.py", "tokenizer.json")
    assert checkpoint.metadata == {"model.safetensors": {"format": "pt"}}
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (12, 4)
    assert checkpoint["model.norm.weight"].nbytes == 16
    assert checkpoint.nbytes == sum(info.end - info.begin for info in checkpoint.tensors.values())
    assert [info.begin for info in checkpoint.tensors.values()] == sorted(i.begin for i in checkpoint.tensors.values())


def test_shards_in_file_order(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(shards=3))
    assert len(checkpoint.weight_files) == 3
    assert checkpoint.index_file == INDEX
    places = [(info.file, info.begin) for info in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert INDEX not in checkpoint.other_files


def test_digests_do_not_depend_on_sharding(make_checkpoint: MakeCheckpoint) -> None:
    one, three = Checkpoint.open(make_checkpoint("one")), Checkpoint.open(make_checkpoint("three", shards=3))
    assert one.header_digest() == three.header_digest()
    assert one.content_digest() == three.content_digest()


def test_digests_see_every_change(make_checkpoint: MakeCheckpoint) -> None:
    tensors = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    base = Checkpoint.open(make_checkpoint("base", tensors))
    changes: dict[str, dict[str, np.ndarray]] = {
        "value": {**tensors, "a": np.array([0, 1, 2, 4], np.float32)},
        "swapped": {"a": tensors["b"].reshape(4), "b": tensors["a"].reshape(2, 2)},
        "shape": {**tensors, "b": np.ones(4, np.float32)},
        "name": {"a": tensors["a"], "c": tensors["b"]},
        "type": {**tensors, "a": tensors["a"].view(np.int32)},
    }
    for change, changed in changes.items():
        other = Checkpoint.open(make_checkpoint(change, changed))
        assert other.content_digest() != base.content_digest(), change
        assert (other.header_digest() != base.header_digest()) == (change not in ("value", "swapped")), change


def test_digests_are_sha256_of_documented_rows(make_checkpoint: MakeCheckpoint) -> None:
    array = np.arange(3, dtype=np.float32)
    checkpoint = Checkpoint.open(make_checkpoint(tensors={"w": array}))
    inner = hashlib.sha256(array.tobytes()).hexdigest()
    assert checkpoint.header_digest() == hashlib.sha256(b'["w","F32",[3]]\n').hexdigest()
    assert checkpoint.content_digest() == hashlib.sha256(f'["w","F32",[3],"{inner}"]\n'.encode()).hexdigest()


def test_unknown_tensor_gets_the_nearest_name(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'model\.norm\.weight'"):
        Checkpoint.open(make_checkpoint())["model.nrom.weight"]


def edit_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index))


def test_index_promises_a_tensor_its_shard_lacks(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    edit_index(root, lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(UsageError, match=r"promises tensor 'ghost' in model-00001-of-00002\.safetensors"):
        Checkpoint.open(root)


def test_index_omits_a_tensor(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    edit_index(root, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(UsageError, match=r"does not list tensor 'model\.norm\.weight', which is in model-"):
        Checkpoint.open(root)


def test_index_names_the_wrong_shard(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    edit_index(
        root,
        lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"}),
    )
    with pytest.raises(UsageError, match=r"promises tensor 'model\.norm\.weight' in .*00001.* but it is in .*00002"):
        Checkpoint.open(root)


def test_missing_shard(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    (root / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"names the file 'model-00002-of-00002\.safetensors', which is missing"):
        Checkpoint.open(root)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b.safetensors"])
def test_index_reaching_outside(make_checkpoint: MakeCheckpoint, file: str) -> None:
    root = make_checkpoint(shards=2)
    save_file({"x": np.ones(1, np.float32)}, root.parent / "outside.safetensors")
    edit_index(root, lambda index: index["weight_map"].update(x=file))
    with pytest.raises(UsageError, match=r"tensor 'x' is said to be in .*, outside the folder"):
        Checkpoint.open(root)


NAME = st.text(LETTERS, max_size=4) | st.sampled_from(
    ["a", "model.safetensors", "x" * 300 + ".safetensors", "\0.safetensors"]
)
VALUE = NAME | NAME.map(lambda name: name + ".safetensors") | st.integers() | st.none() | st.lists(NAME, max_size=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight_map=st.dictionaries(NAME, VALUE, max_size=3) | VALUE)
def test_any_index_is_read_or_refused(tmp_path: Path, weight_map: Any) -> None:
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    try:
        found = Checkpoint.open(tmp_path)
    except UsageError:
        return
    assert weight_map == {"a": "model.safetensors"}
    assert list(found.tensors) == ["a"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_malformed_index(make_checkpoint: MakeCheckpoint, text: str) -> None:
    root = make_checkpoint(shards=2)
    (root / INDEX).write_text(text)
    with pytest.raises(UsageError, match=INDEX):
        Checkpoint.open(root)


def test_a_tensor_in_two_shards(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    save_file({"model.norm.weight": np.ones(4, np.float32)}, root / "model-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match=r"'model\.norm\.weight' is in both"):
        Checkpoint.open(root)


def test_stale_single_file_beside_shards(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    save_file({"x": np.ones(1, np.float32)}, root / "model.safetensors")
    with pytest.raises(UsageError, match=r"both model\.safetensors and model\.safetensors\.index\.json.*stale"):
        Checkpoint.open(root)


def test_an_index_over_the_single_file_is_fine(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(tensors={"w": np.ones(2, np.float32)})
    (root / INDEX).write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    assert Checkpoint.open(root).weight_files == ("model.safetensors",)


def test_other_weight_names(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint()
    (root / "model.safetensors").rename(root / "diffusion_pytorch_model.safetensors")
    assert Checkpoint.open(root).weight_files == ("diffusion_pytorch_model.safetensors",)
    save_file({"x": np.ones(1, np.float32)}, root / "second.safetensors")
    with pytest.raises(UsageError, match=r"several files could be the weights"):
        Checkpoint.open(root)


def test_a_second_copy_of_the_weights_does_not_travel(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(files={"tokenizer.model": "t", "training_args.bin": "p", "checkpoint-5/optimizer.pt": "p"})
    save_file({"x": np.ones(1, np.float32)}, root / "consolidated.safetensors")
    (root / "consolidated.safetensors.index.json").write_text("{}")
    checkpoint = Checkpoint.open(root)
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.other_files == ("config.json", "tokenizer.model")
    assert set(checkpoint.left_behind) == {
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "training_args.bin",
    }


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], r"no \*\.safetensors found"),
        (["pytorch_model.bin", "config.json"], r"only as pytorch_model\.bin, a pickle.*convert it to safetensors"),
        (["model.gguf"], "only as GGUF"),
        (["model-00001-of-00002.safetensors"], r"their index \(\*\.safetensors\.index\.json\) is missing"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter.*merge_and_unload"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "several weight indexes"),
    ],
)
def test_folders_without_usable_weights(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=reason) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_pipeline_of_several_models_names_its_folders(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint("pipeline/unet").parent
    with pytest.raises(UsageError, match=r"did you mean one of its folders \(unet\)"):
        Checkpoint.open(root)


def test_not_a_folder(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint()
    with pytest.raises(UsageError, match="is a file; give the folder"):
        Checkpoint.open(root / "model.safetensors")
    with pytest.raises(UsageError, match="No such file"):
        Checkpoint.open(root / "none")


@pytest.mark.parametrize("text", ["", "[1]", "{'a': 1}", "[" * 100_000])
def test_malformed_config(make_checkpoint: MakeCheckpoint, text: str) -> None:
    root = make_checkpoint()
    (root / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        Checkpoint.open(root)


def test_no_config_is_an_empty_one(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint()
    (root / "config.json").unlink()
    assert Checkpoint.open(root).config == {}


def test_no_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="has no tensors"):
        Checkpoint.open(tmp_path)


def test_links_are_followed_but_broken_ones_and_pipes_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint()
    blob = root.parent / "blob"
    (root / "model.safetensors").rename(blob)
    (root / "model.safetensors").symlink_to(blob)
    (root / "vocab.txt").symlink_to(root / "config.json")
    assert Checkpoint.open(root).other_files == ("config.json", "vocab.txt")
    (root / "merges.txt").symlink_to(root / "gone")
    with pytest.raises(UsageError, match=r"merges\.txt: cannot be read"):
        Checkpoint.open(root)
    (root / "merges.txt").unlink()
    os.mkfifo(root / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt: is neither"):
        Checkpoint.open(root)


def test_linked_folders_are_entered_once(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(files={"code/model.py": "pass"})
    (root.parent / "assets").mkdir()
    (root.parent / "assets" / "vocab.txt").write_text("v")
    (root / "assets").symlink_to(root.parent / "assets")
    (root / "code" / "loop").symlink_to(root)
    (root / "code" / "up").symlink_to(root.parent)
    (root / "pipe.txt.d").mkdir()
    assert Checkpoint.open(root).other_files == ("assets/vocab.txt", "code/model.py", "config.json")


@pytest.mark.parametrize("listed", ['[{"path": ""}, {"path": "2_Dense"}]', '[{"path": 3}, 4]', "{", '{"path": "x"}'])
def test_modules_of_sentence_transformers_have_their_weights(make_checkpoint: MakeCheckpoint, listed: str) -> None:
    weights = "2_Dense/model.safetensors"
    root = make_checkpoint(files={"modules.json": listed, weights: "w", "2_Dense/optimizer.pt": "", "3/model.bin": ""})
    opened = Checkpoint.open(root)
    assert (weights in opened.other_files) == listed.endswith('"2_Dense"}]')
    assert {"2_Dense/optimizer.pt", "3/model.bin"} <= set(opened.left_behind)


def test_reading_a_changed_file_fails(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint()
    checkpoint = Checkpoint.open(root)
    os.utime(root / "model.safetensors", ns=(1, 1))
    with pytest.raises(KtmergeError, match=r"model\.safetensors: was changed"):
        checkpoint.content_digest()


def test_experts_are_numbered_by_numbers(make_checkpoint: MakeCheckpoint) -> None:
    odd = f"model.layers.0.mlp.experts.{'1' * 5000}.up_proj.weight"
    opened = Checkpoint.open(make_checkpoint(tensors={odd: np.zeros((2, 2), np.float32)}))
    assert fit_experts(opened, opened) is opened


def test_files_are_told_by_where_they_are(make_checkpoint: MakeCheckpoint) -> None:
    root = make_checkpoint(shards=2)
    index = root / "model.safetensors.index.json"
    plain = Checkpoint.open(root)
    index.write_text(index.read_text().replace(': "model-', ': "./model-', 2))
    assert Checkpoint.open(root) == plain
    assert plain.left_behind == (index.name,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stacks_that_lie_the_other_way_round_are_turned(make_checkpoint: MakeCheckpoint, dtype: Any) -> None:
    """Any piece has the bits of the whole; a square one is left alone, as transformers leaves it."""
    numbers, owner = np.random.default_rng(0), "model.layers.0.mlp.experts"
    up = numbers.random((3, 4, 10)).astype(dtype)
    square = numbers.random((3, 5, 5)).astype(dtype)
    turned = np.ascontiguousarray(up.transpose(0, 2, 1))
    base = {f"{owner}.gate_up_proj": up, f"{owner}.down_proj": square}
    other = {f"{owner}.gate_up_proj": turned, f"{owner}.down_proj": square}
    opened = Checkpoint.open(make_checkpoint("other", other))
    shown = fit_experts(Checkpoint.open(make_checkpoint("base", base)), opened)
    with shown.reader() as reader:
        for name, values in base.items():
            assert shown[name].shape == values.shape
            for start, stop in ((0, 120), (7, 93), (39, 41), (80, 120)):
                start, stop = min(start, values.size), min(stop, values.size)
                assert np.array_equal(reader.read(name, start, stop).numpy(), values.reshape(-1)[start:stop])
    assert fit_experts(opened, opened) is opened


def test_a_turned_matrix_is_read_once_for_all_its_pieces(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks ``[E, in, out]`` over a base that has ``[E, out, in]``."""
    values = {
        "m.experts.gate_up_proj": np.arange(48, dtype=np.float32).reshape(2, 4, 6),
        "m.experts.down_proj": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    }
    base = {name: np.ascontiguousarray(one.transpose(0, 2, 1)) for name, one in values.items()}
    opened = Checkpoint.open(make_checkpoint("turned", values))
    shown = fit_experts(Checkpoint.open(make_checkpoint("base", base)), opened)
    reads, whole = [], TensorReader.read_into

    def counted(self: TensorReader, name: str, start: int, target: memoryview) -> None:
        reads.append((name, start))
        whole(self, name, start, target)

    monkeypatch.setattr(TensorReader, "read_into", counted)
    with shown.reader() as reader:
        for name, one in base.items():
            pieces = [reader.read(name, start, start + 4).numpy() for start in range(0, one.size, 4)]
            assert np.array_equal(np.concatenate(pieces), one.reshape(-1))
    assert len(reads) == len(set(reads)) == 4
