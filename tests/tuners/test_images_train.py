"""Fine-tunes on images: what moves, what is told, and that everything else a fine-tune can do works with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loadable import assert_loads_whole
from seeing import FAMILIES, build, picture
from test_statistics_images import tiny_llava  # noqa: F401 - a fixture
from tuning import Listener, sha256, weights, write

from ktmerge import api
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.load import parse_recipe
from ktmerge.tuners import FinetuneReport, finetune

COUNT = 6
JOB: dict[str, Any] = {
    "data": ["seeing.jsonl"],
    "image_root": "pictures",
    "max_steps": 4,
    "batch_size": 3,
    "learning_rate": 1e-3,
    "precision": "float32",
    "warmup": 0,
}


def tune(base: Path, folder: Path, out: str = "out", /, **settings: Any) -> FinetuneReport:
    prepare(folder)
    flags = {name: settings.pop(name) for name in ("overwrite", "resume", "progress") if name in settings}
    return finetune(FinetuneJob.model_validate({**JOB, **settings}), base, folder / out, folder=folder, **flags)


def prepare(folder: Path) -> None:
    """Rows with an image, one with two, and one with none."""
    for number in range(COUNT):
        picture(folder / "pictures" / f"{number}.png", (16, 16), number)
    rows: list[dict[str, Any]] = [
        {"prompt": f"Is {n} good?", "completion": " yes" * (1 + n), "images": [f"{n}.png"]} for n in range(COUNT)
    ]
    rows.append({"prompt": "<image> or <image>?", "completion": " one", "images": ["0.png", "1.png"]})
    write(folder / "seeing.jsonl", [*rows, {"prompt": "Is it?", "completion": " no"}])


def moved(base: Path, out: Path) -> set[str]:
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name].to(before[name].dtype))}


def own_loss(base: Path, folder: Path) -> float:
    """The mean over all answer tokens by the model and its processor alone."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(base)
    model: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    total, count = 0.0, 0
    for line in (folder / "seeing.jsonl").read_text().splitlines():
        row = json.loads(line)
        names = row.get("images", [])
        prompt = row["prompt"] if "<image>" in row["prompt"] else "<image>" * len(names) + row["prompt"]
        images = [Image.open(folder / "pictures" / name) for name in names]
        given = processor(text=prompt + row["completion"] + "<|im_end|>", images=images or None, return_tensors="pt")
        answer = len(processor.tokenizer(row["completion"])["input_ids"]) + 1
        with torch.no_grad():
            logits = model(**given).logits[0, -answer - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, given["input_ids"][0, -answer:], reduction="sum"))
        count += answer
    return total / count


def test_the_loss_is_that_of_the_answers(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    report = tune(tiny_llava, tmp_path, max_steps=1, eval_upstream="seeing.jsonl", train="connector")
    told = report.losses["evaluations"][0]["upstream"]
    assert told == pytest.approx(own_loss(tiny_llava, tmp_path), rel=1e-5)
    assert moved(tiny_llava, tmp_path / "out") == {n for n in weights(tiny_llava) if "projector" in n}
    counts = report.record["counts"]["train"]
    assert (counts["samples"], counts["dropped"]) == (COUNT + 2, 0)
    assert "image_root" not in json.dumps(report.record["inputs"])


def test_missing_images_stop_it_before_anything_is_written(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="6 of 6 images cannot be used"):
        tune(tiny_llava, tmp_path, image_root="nowhere")
    assert not list(tmp_path.glob("out*"))


def test_a_processor_of_another_model_is_noticed(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    import shutil

    shutil.copytree(tiny_llava, tmp_path / "base")
    path = tmp_path / "base/processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 4}))
    with pytest.raises(UsageError, match="the processor writes other tokens for an image than the model makes"):
        tune(tmp_path / "base", tmp_path)


@pytest.mark.slow
def test_an_image_that_goes_away_while_training(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    class Remover(Listener):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("step 1/"):
                (tmp_path / "pictures/0.png").unlink()

    with pytest.raises(KtmergeError, match=r"an image could be read before, and now cannot: .*0.png"):
        tune(tiny_llava, tmp_path, max_steps=8, progress=Remover())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"replay": ["seeing.jsonl"], "distill": 0.5, "batch_size": 4},
        {"select": "gradient", "every": 2, "select_samples": 4},
        {"gradient_accumulation": 2, "activation_checkpointing": True, "eval_downstream": "seeing.jsonl"},
        {"l2_sp": 0.1, "average": "ema", "group_by_length": True},
        {"precision": "bfloat16", "stop_upstream": 5.0, "eval_upstream": "seeing.jsonl"},
        {"adapter": {"name": "lora"}},
    ],
    ids=str,
)
def test_with_everything_else(tiny_llava: Path, tmp_path: Path, settings: dict[str, Any]) -> None:  # noqa: F811
    report = tune(tiny_llava, tmp_path, **settings)
    assert moved(tiny_llava, tmp_path / "out")
    assert report.losses["last"] < report.losses["first"] or settings.get("distill")


@pytest.mark.slow
def test_distilling_from_itself_adds_nothing_at_first(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = tune(tiny_llava, tmp_path, max_steps=1)
    distilled = tune(tiny_llava, tmp_path, "other", max_steps=1, distill=1.0)
    assert distilled.losses["first"] == pytest.approx(plain.losses["first"], rel=1e-5)


@pytest.mark.slow
def test_packing_is_refused(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="samples with images cannot share a row"):
        tune(tiny_llava, tmp_path, packing=True)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    class Stopper(Listener):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("step 3/"):
                os.kill(os.getpid(), 2)

    tune(tiny_llava, tmp_path, "whole", max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llava, tmp_path, max_steps=6, progress=Stopper())
    tune(tiny_llava, tmp_path, max_steps=6, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    picture(tmp_path / "pictures/3.png", (16, 16), 99)
    with pytest.raises(UsageError, match=r"other settings: another images \(train\)"):
        finetune(
            FinetuneJob.model_validate({**JOB, "max_steps": 6}),
            tiny_llava,
            tmp_path / "out",
            folder=tmp_path,
            resume=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_train_says_moves_and_it_blends(family: str, tiny_llama: Path, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", tiny_llama)
    report = tune(base, tmp_path, train="connector+last:1", max_steps=8)
    parts = Parts(weights(base), {"text_config": {"vocab_size": 1}})
    assert {parts.of(name) for name in moved(base, tmp_path / "out")} == {"connector", "llm.layers[1]"}
    assert report.losses["last"] < report.losses["first"]

    blended = tmp_path / "blended"
    recipe = {
        "ktmerge": 1,
        "base": "base",
        "experts": {"out": {"model": "out"}},
        "blend": {"method": "linear", "lambda": 0.5},
    }
    api.blend(parse_recipe(recipe, "recipe", tmp_path), blended)
    assert_loads_whole(blended)
    before, after, mixed = weights(base), weights(tmp_path / "out"), weights(blended)
    assert mixed.keys() == before.keys()
    for name in moved(base, tmp_path / "out"):
        torch.testing.assert_close(mixed[name], (before[name] + after[name]) / 2)


@pytest.mark.slow
def test_a_broken_torchvision_does_no_harm(tiny_llama: Path, tmp_path: Path) -> None:
    base = build("qwen2.5-vl", tmp_path / "base", tiny_llama)
    package = tmp_path / "broken/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    prepare(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    trap = [sys.executable, "-c", "from transformers import Trainer"]
    assert subprocess.run(trap, env=environment, capture_output=True).returncode != 0
    command = [sys.executable, "-m", "ktmerge", "finetune", "--base", "base", "--data", "seeing.jsonl"]
    command += ["--image-root", "pictures", "--out", "new", "--set", "max_steps=1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "new").keys() == weights(base).keys()


@pytest.mark.slow
def test_batches_of_texts_pass_the_connector_by(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    listener = Listener()
    tune(tiny_llava, tmp_path, train="connector", batch_size=1, max_steps=COUNT + 2, progress=listener)
    assert moved(tiny_llava, tmp_path / "out")
    assert any("1 of 8 samples, those without images, teach nothing" in note for note in listener.notes)


@pytest.mark.parametrize("settings", [{"train": "vision+connector"}, {"adapter": {"name": "visual-prompt"}}])
def test_training_that_texts_cannot_reach_is_refused(
    tiny_llava: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    prepare(tmp_path)
    write(tmp_path / "texts.jsonl", [{"prompt": "Is it?", "completion": " no"}])
    with pytest.raises(UsageError, match="the data has no images"):
        tune(tiny_llava, tmp_path, data=["texts.jsonl"], activation_checkpointing=True, **settings)
    assert not (tmp_path / "out").exists()
