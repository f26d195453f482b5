"""Models that see: every kind of task with images, against the processor's own way, whatever holds the images."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import read_sets, score_model
from ktmerge.eval.encode import Encoded
from ktmerge.eval.evaluation import _task_info
from ktmerge.eval.sight import parts
from ktmerge.recipes.suites import Suite

pytest.importorskip("PIL")
sys.path.append(str(Path(__file__).parent.parent / "tuners"))  # the tiny models that see
from seeing import FAMILIES, build, picture

CHOICES = ["good", "bad indeed", "three four"]
SHAPES = [(16, 16), (40, 20), (24, 64), (17, 33)]


class Seeing:
    """A model that sees, with all that scores it."""

    def __init__(self, folder: Path) -> None:
        import torch

        from ktmerge.eval.loading import load_model, load_sight, load_tokenizer

        self.folder = folder
        self.model = load_model(folder, torch.device("cpu"), torch.float32)
        self.tokenizer, self.sight = load_tokenizer(folder), load_sight(folder)

    def score(self, suite: Suite, batch_size: int = 16) -> dict[str, Any]:
        return score_model(self.model, self.tokenizer, read_sets(suite), batch_size=batch_size, sight=self.sight)

    def logprob(self, text: str, images: list[Any], continuation: str) -> float:
        """Sum of log p of the continuation's tokens, by the processor and one unpadded pass."""
        import torch

        processor = self.sight._processor
        if type(processor).__name__ == "PaliGemmaProcessor":  # answers are its suffixes, each with an end token
            whole = processor(text=[text], images=[images], suffix=[continuation], return_tensors="pt")
            whole = {name: value[:, :-1] if name != "pixel_values" else value for name, value in whole.items()}
        else:
            whole = processor(
                text=[text + continuation], images=[images], return_tensors="pt", add_special_tokens=False
            )
            whole = dict(whole)
        whole.pop("labels", None)
        tail = len(processor.tokenizer(continuation, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            logits = self.model(**whole).logits[0].double().log_softmax(-1)
        ids = whole["input_ids"][0]
        return sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - tail, len(ids)))


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seeing]:
    made: dict[str, Seeing] = {}

    def get(family: str) -> Seeing:
        if family not in made:
            made[family] = Seeing(build(family, tmp_path_factory.mktemp("seeing") / family, tiny_llama))
        return made[family]

    return get


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shape in enumerate(SHAPES):
        picture(tmp_path / "pictures" / f"{number}.png", shape, number)
    rows = [
        {"q": f"The dog {i} is", "o": CHOICES, "g": i % 3, "im": f"{i % 4}.png" if i != 5 else None} for i in range(6)
    ]
    write(tmp_path / "x.jsonl", rows)
    return tmp_path


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


COMMON = {"data": "x.jsonl", "image": "im", "images": "pictures"}


def every_kind(folder: Path, chat: bool, **more: Any) -> Suite:
    asked = {**COMMON, "chat": chat, "prompt": "{{ q }}", **more}
    tasks = [
        {"name": "choice", "kind": "choice", "choices": "o", "answer": "{{ g }}"},
        {"name": "classify", "kind": "classify", "labels": ["yes", "no way"], "answer": "{{ g % 2 }}", "shots": 1},
        {"name": "say", "kind": "generate", "answer": "{{ [o[g]] * 10 }}", "max_new_tokens": 5, "metric": "vqa"},
        {"name": "letter", "kind": "letter", "prompt": "{{ q }}\n{{ lettered }}", "choices": "o", "answer": "{{ g }}",
         "max_new_tokens": 4},
        {"name": "follow", "kind": "instructions", "instructions": "kinds", "arguments": "given", "max_new_tokens": 4},
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "x.jsonl").read_text().splitlines()]
    write(folder / "x.jsonl", [row | {"kinds": ["punctuation:no_comma"], "given": [{}]} for row in rows])
    text = {"name": "text", "kind": "text", "text": "{{ q }} {{ o[1] }}", **COMMON}
    return Suite(upstream=[*({**asked, **task} for task in tasks), text], folder=folder)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, score in wanted.items():
        np.testing.assert_array_equal(found[name].scores, score.scores)
        for column, values in score.details.items():
            if column in ("logprobs", "nll"):
                np.testing.assert_allclose(np.hstack(found[name].details[column]), np.hstack(values), atol=1e-4)
            else:
                assert found[name].details[column] == values, (name, column)


def check_family(
    seeing: Seeing, folder: Path, chat: bool, batches: Sequence[tuple[int, str]] = ((3, "right"), (16, "left"))
) -> None:
    suite = every_kind(folder, chat)
    alone = seeing.score(suite, batch_size=1)
    for batch_size, side in batches:
        seeing.tokenizer.padding_side = seeing.sight._processor.tokenizer.padding_side = side
        same(seeing.score(suite, batch_size), alone)
    from PIL import Image

    image = Image.open(folder / "pictures" / "1.png")
    place = seeing.sight._place
    if chat:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "The dog 1 is"}]}]
        text = seeing.sight._processor.apply_chat_template(turn, add_generation_prompt=True)
    else:
        text = place + "The dog 1 is"
    if text == text.rstrip():  # else white space belongs to the continuation, which the oracle does not know
        for choice, found in zip(CHOICES, alone["choice"].details["logprobs"][1], strict=True):
            ending = choice if chat or seeing.sight._processor.chat_template is None else f" {choice}"
            assert found == pytest.approx(seeing.logprob(text, [image], ending), abs=1e-3)


@pytest.mark.slow
def test_llava(models: Callable[[str], Seeing], folder: Path) -> None:
    check_family(models("llava"), folder, False, [(4, "left")])


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_llava_in_other_batches(models: Callable[[str], Seeing], folder: Path, chat: bool) -> None:
    check_family(models("llava"), folder, chat)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava"])
def test_families(models: Callable[[str], Seeing], folder: Path, family: str, chat: bool) -> None:
    if family == "paligemma" and chat:
        with pytest.raises(UsageError, match="has no chat template"):
            models(family).score(every_kind(folder, chat))
    else:
        check_family(models(family), folder, chat)


@pytest.mark.slow
def test_whatever_holds_the_images(models: Callable[[str], Seeing], folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    task = {"name": "t", "kind": "choice", "prompt": "{{ q }}", "choices": "o", "answer": "{{ g }}", "image": "im"}
    named = models("llava").score(Suite(upstream=[{**task, **COMMON}], folder=folder))["t"]
    rows = [json.loads(line) for line in (folder / "x.jsonl").read_text().splitlines()]
    files = [row["im"] and (folder / "pictures" / row["im"]).read_bytes() for row in rows]
    (folder / "set" / "data").mkdir(parents=True)
    embedded = [
        row | {"im": {"bytes": file, "path": None} if file else None} for row, file in zip(rows, files, strict=True)
    ]
    table = pyarrow.Table.from_pylist(embedded)
    pyarrow.parquet.write_table(table, folder / "set" / "data" / "test-00000-of-00001.parquet")
    written = [row | {"im": file and base64.b64encode(file).decode()} for row, file in zip(rows, files, strict=True)]
    write(folder / "base64.jsonl", written)
    write(folder / "beside.jsonl", [row | {"im": row["im"] and f"pictures/{row['im']}"} for row in rows])
    for data in (
        {"data": "set", "split": "test"}, {"data": f"hf:{folder / 'set'}", "split": "test"}, {"data": "base64.jsonl"},
        {"data": "beside.jsonl"}, {"data": "beside.jsonl", "image": "{{ im }}"},
    ):  # fmt: skip
        same(models("llava").score(Suite(upstream=[{**task, **data}], folder=folder)), {"t": named})


def test_several_images_stand_in_their_places(models: Callable[[str], Seeing], folder: Path) -> None:
    from PIL import Image

    seeing = models("llava")
    write(folder / "two.jsonl", [{"q": "Is <image> like <image>", "a": "2.png", "b": "0.png"}])
    task = {"name": "t", "kind": "choice", "data": "two.jsonl", "image": ["a", "b"], "images": "pictures",
            "prompt": "{{ q }}", "choices": ["yes", "no"], "answer": "0"}  # fmt: skip
    images = [Image.open(folder / "pictures" / name) for name in ("2.png", "0.png")]
    (found,) = seeing.score(Suite(upstream=[task], folder=folder))["t"].details["logprobs"]
    assert found[0] == pytest.approx(seeing.logprob("Is <image> like <image>", images, " yes"), abs=1e-3)
    assert abs(found[0] - seeing.logprob("Is <image> like <image>", images[::-1], " yes")) > 1e-6
    assert parts("x", 2) == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]
    with pytest.raises(UsageError, match=r"two\.jsonl:1: the prompt has places .* for 2 images, the row has 1"):
        seeing.score(Suite(upstream=[{**task, "image": "a"}], folder=folder))


PICKED = {"data": "pick.jsonl", "images": "pictures", "image": "im", "choice_images": "options",
          "prompt": "{{ q }}\n{{ lettered }}\nWhich", "answer": "{{ g }}"}  # fmt: skip


def picking(folder: Path, *tasks: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Suite:
    write(folder / "pick.jsonl", rows or [{"q": "The dog", "im": "3.png", "options": ["1.png", "2.png"], "g": 1}])
    return Suite(upstream=[{"name": "t", **PICKED, **task} for task in tasks], folder=folder)


def test_choices_that_are_images_are_compared_by_their_letters(models: Callable[[str], Seeing], folder: Path) -> None:
    from PIL import Image

    seeing = models("llava")
    text = "<image>The dog\nA. <image>\nB. <image>\nWhich"
    images = [Image.open(folder / "pictures" / name) for name in ("3.png", "1.png", "2.png")]
    wanted = [seeing.logprob(text, images, f" {letter}") for letter in "AB"]
    found = seeing.score(picking(folder, {"kind": "choice"}))["t"]
    assert found.details["logprobs"][0] == pytest.approx(wanted, abs=1e-3)
    assert found.scores[0] == float(wanted[1] > wanted[0])
    swapped = [{"q": "The dog", "im": "3.png", "options": ["2.png", "1.png"], "g": 1}]
    other = seeing.score(picking(folder, {"kind": "choice"}, rows=swapped))["t"].details["logprobs"][0]
    assert not np.allclose(other, wanted, atol=1e-6), "the model sees which image is which"


@pytest.mark.slow
def test_choices_that_are_images_are_asked_for_by_letter(models: Callable[[str], Seeing], folder: Path) -> None:
    columns = [{"q": "Which", "im": None, "x": "1.png", "y": "2.png", "z": None, "n": "a.png,b.png", "g": answer}
               for answer in (1, "1", "b.png", "B", " B")]  # fmt: skip
    task = {"kind": "letter", "choice_images": ["x", "y", "z"], "choices": "{{ n.split(',') }}", "max_new_tokens": 3}
    shown = [{"q": "Like this", "im": "0.png", "x": "1.png", "y": "3.png", "z": "2.png", "n": "a,b,c", "g": "c"}]
    write(folder / "shown.jsonl", shown)
    suite = picking(folder, {**task, "name": "a", "shots": 1, "shots_from": "shown.jsonl"}, rows=columns)
    (one,) = read_sets(suite)
    assert [item.answer for item in one.items] == [1] * 5
    first = one.items[0]
    assert first.prompt == "Which\nA. <image>\nB. <image>\nWhich"
    assert [image.path.name for image in first.images] == ["1.png", "2.png"]
    assert [image.path.name for image in first.shots[0].images] == ["0.png", "1.png", "3.png", "2.png"]
    assert first.shots[0].prompt.count("<image>") == 4
    assert first.shots[0].answer == " C"
    for chat in (False, True):
        own = Suite(upstream=[suite.upstream[0].model_copy(update={"chat": chat})], folder=folder)
        same(models("llava").score(own, batch_size=2), models("llava").score(own, batch_size=1))
    changed = picking(folder, {**task, "name": "a", "shots": 1, "shots_from": "shown.jsonl"}, rows=columns)
    picture(folder / "pictures" / "2.png", SHAPES[2], 77)
    assert read_sets(changed)[0].digest != one.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": ["1.png"]}, r"choice_images: .*pick\.jsonl:1 has 1, at least 2"),
        ({"options": []}, r"choice_images: none of its 1 rows has an image"),
        ({"options": ["1.png", None, "2.png"]}, r"pick\.jsonl:1: choice 2 has 0 images, exactly one"),
        ({"options": ["1.png", ["2.png", "3.png"]]}, r"pick\.jsonl:1: choice 2 has 2 images, exactly one"),
        ({"options": ["1.png", "9.png"]}, r"pick\.jsonl:1: .*9\.png: no such image"),
        ({"options": ["1.png", 5]}, r"pick\.jsonl:1: an image is a path, bytes or base64, not int"),
        ({"g": 2}, r"answer: .*pick\.jsonl:1 gives index 2; its 2 choices count from 0"),
        ({"g": "C"}, r"answer: .*pick\.jsonl:1 gives 'C', which is none of its choices \['image 1', 'image 2'\]"),
    ],
)
def test_choices_that_are_no_images_are_named(folder: Path, change: dict[str, Any], said: str) -> None:
    row = {"q": "The dog", "im": "3.png", "options": ["1.png", "2.png"], "g": 1} | change
    with pytest.raises(UsageError, match=said):
        read_sets(picking(folder, {"kind": "letter"}, rows=[row]))


def test_a_task_of_images_to_choose_from_is_whole(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"pick\.jsonl:1 has 3 choices, but 2 images of choices"):
        read_sets(picking(folder, {"kind": "choice", "choices": ["x", "y", "z"]}))
    for change, said in (
        ({"prompt": "{{ q }}"}, "the prompt must show the images to choose from"),
        ({"choice_images": None, "image": "im"}, "there are no choices: give 'choices'"),
    ):
        with pytest.raises(ValueError, match=said):
            picking(folder, {"kind": "choice", **change})


def test_worked_examples_show_their_images(models: Callable[[str], Seeing], folder: Path) -> None:
    from PIL import Image

    seeing = models("llava")
    write(folder / "shot.jsonl", [{"q": "Which", "a": "three", "im": "3.png"}])
    task = {
        "name": "t",
        "kind": "choice",
        "prompt": "{{ q }}",
        "choices": ["yes", "three"],
        "answer": "{{ a }}",
        **COMMON,
    }
    write(folder / "x.jsonl", [{"q": "What", "a": "yes", "im": "1.png"}])
    suite = Suite(upstream=[{**task, "shots": 1, "shots_from": "shot.jsonl"}], folder=folder)
    (found,) = seeing.score(suite)["t"].details["logprobs"]
    images = [Image.open(folder / "pictures" / name) for name in ("3.png", "1.png")]
    assert found[1] == pytest.approx(seeing.logprob("<image>Which three\n\n<image>What", images, " three"), abs=1e-3)


def test_all_images_are_looked_at_before_anything_is_scored(folder: Path) -> None:
    (folder / "pictures" / "2.png").write_bytes((folder / "pictures" / "2.png").read_bytes()[:90])
    (folder / "pictures" / "3.png").unlink()
    task = {"name": "t", "kind": "generate", "prompt": "{{ q }}", "answer": "x", **COMMON}
    with pytest.raises(UsageError) as caught:
        read_sets(Suite(upstream=[task], folder=folder))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "task 't': " in lines[0]
    assert "x.jsonl:3: " in lines[0]
    assert "2.png: not an image that can be read" in lines[0]
    assert "x.jsonl:4: " in lines[1]
    assert "3.png: no such image" in lines[1]
    for change, said in (
        ({"image": "img"}, "no column 'img'.*Did you mean 'im'"),
        ({"image": "o"}, "x.jsonl:1: .*no such image"),
        ({"image": "g"}, "x.jsonl:1: an image is a path, bytes or base64, not int"),
        ({"image": "{{ none }}"}, "none of its 6 rows has an image"),
        ({"images": "pics"}, "there is no such folder"),
    ):
        with pytest.raises(UsageError, match=f"(?s){said}"):
            read_sets(Suite(upstream=[{**task, **change}], folder=folder))


def test_a_changed_image_is_another_task(folder: Path) -> None:
    suite = Suite(upstream=[{"name": "t", "kind": "generate", "prompt": "q", "answer": "x", **COMMON}], folder=folder)
    (before,) = read_sets(suite)
    (again,) = read_sets(suite)
    picture(folder / "pictures" / "1.png", SHAPES[1], 99)
    (after,) = read_sets(suite)
    assert before.digest == again.digest != after.digest


def test_what_does_not_fit_is_refused(models: Callable[[str], Seeing], folder: Path, tiny_llama: Path) -> None:
    from ktmerge.eval.loading import load_sight
    from ktmerge.eval.sets import encode_sets

    seeing = models("llava")
    sets = read_sets(Suite(upstream=[{"name": "t", "kind": "choice", "prompt": "{{ q }}", "choices": "o",
                                      "answer": "{{ g }}", **COMMON}], folder=folder))  # fmt: skip
    with pytest.raises(
        UsageError, match=r"task 't': .*x\.jsonl:1: with its images it is \d+ tokens long, the model reads 8"
    ):
        encode_sets(sets, seeing.tokenizer, 8, seeing.sight)
    with pytest.raises(UsageError, match=r"task 't': .*x\.jsonl:1: shows images, but the model has no processor"):
        encode_sets(sets, seeing.tokenizer, None)
    with pytest.raises(UsageError, match="has no processor that takes images"):
        load_sight(tiny_llama)


def test_text_turns_reach_templates_of_models_that_see(models: Callable[[str], Seeing]) -> None:
    from ktmerge.eval.encode import Encoder

    seeing = models("llava")  # its template takes a turn's parts, and leaves out a bare text
    assert "What now" in Encoder(seeing.tokenizer, None).prompt("What now", chat=True)


@pytest.mark.slow
def test_scored_end_to_end_with_the_base(models: Callable[[str], Seeing], folder: Path) -> None:
    from ktmerge.eval import evaluate

    base = models("llava").folder
    suite = Suite(upstream=[{"name": "t", "kind": "generate", "prompt": "{{ q }}", "answer": "x", "max_new_tokens": 3,
                             **COMMON}], folder=folder)  # fmt: skip
    results = evaluate({"base": base, "same": base}, suite, device="cpu", bootstrap=20)
    assert results.scores["base"]["t"].details == results.scores["same"]["t"].details
    alone = models("llava").score(suite)["t"]
    assert results.scores["base"]["t"].details["outputs"] == alone.details["outputs"]


def test_embedded_broken_images_name_their_row(tmp_path: Path) -> None:
    good = base64.b64encode(picture(tmp_path / "noise.png").read_bytes()).decode()
    write(tmp_path / "x.jsonl", [{"im": good}, {"im": good[:400]}])
    task = {"name": "t", "kind": "generate", "data": "x.jsonl", "prompt": "q", "answer": "x", "image": "im"}
    with pytest.raises(UsageError, match=r"task 't': .*x.jsonl:2: an embedded image: not an image that can be read"):
        read_sets(Suite(upstream=[task], folder=tmp_path))


def test_divergence_sees_the_images(models: Callable[[str], Seeing], folder: Path) -> None:
    """KL to another model of what follows the image, against the processor's own way and float64."""
    import copy

    import torch
    from PIL import Image

    from ktmerge.eval.sets import encode_sets
    from ktmerge.eval.teachers import prompts
    from ktmerge.eval.unlabelled import divergence

    seeing = models("llava")
    student = copy.deepcopy(seeing.model)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.5)
    task = {"name": "t", "kind": "generate", "prompt": "{{ q }}", "answer": "x", **COMMON}
    sets = read_sets(Suite(upstream=[task], folder=folder))
    texts = prompts(encode_sets(sets, seeing.tokenizer, None, seeing.sight)["t"], seeing.sight)
    assert [view is None for view in texts.views] == [False] * 5 + [True]
    found = [
        divergence(seeing.model, student, texts.ids, starts=texts.starts, views=texts.views, sight=seeing.sight,
                   batch_size=size) for size in (1, 4)
    ]  # fmt: skip
    np.testing.assert_allclose(*found, rtol=1e-3)
    image = Image.open(folder / "pictures" / "1.png")
    inputs = seeing.sight._processor(text=["<image>The dog 1 is"], images=[image], return_tensors="pt",
                                     add_special_tokens=False)  # fmt: skip
    words = len(seeing.tokenizer.encode("The dog 1 is", add_special_tokens=False))
    with torch.inference_mode():
        p, q = (one(**inputs).logits[0, -words - 1 :].double().log_softmax(-1) for one in (seeing.model, student))
    assert found[0][1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


@pytest.mark.slow
def test_a_sweep_screens_with_the_images(models: Callable[[str], Seeing], folder: Path) -> None:
    import copy

    import torch

    from ktmerge.sweep.divergence import Teachers
    from ktmerge.sweep.rounds import cut

    seeing = models("llava")
    student = copy.deepcopy(seeing.model)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.5)
    suite = every_kind(folder, chat=False)

    def distances() -> list[tuple[float, float]]:
        found = []
        for task in suite.upstream:
            sets = read_sets(
                Suite(upstream=[task], downstream=[task.model_copy(update={"name": "down"})], folder=folder)
            )
            rounds = cut(sets, [1.0], seeing.tokenizer, None, seeing.sight)
            teachers = Teachers(seeing.model, {"x": seeing.model}, rounds[0], seeing.tokenizer, seeing.sight)
            found.append(teachers.distances(student))
        return found

    before = np.array(distances())
    assert (before > 0).all()
    for number, shape in enumerate(SHAPES):
        picture(folder / "pictures" / f"{number}.png", shape, number + 50)
    assert (before != np.array(distances())).all()


def test_rows_of_one_image_or_of_one_row_are_drawn_together(folder: Path) -> None:
    rows = [
        {"q": "a", "im": name, "options": ["1.png", "2.png"], "g": 1} for name in ("1.png", "2.png", "1.png", "3.png")
    ]
    (one,) = read_sets(picking(folder, {"kind": "choice"}, rows=rows))
    assert one.drawn_with(range(4)) == [0, 1, 0, 3]
    assert _task_info(replace(one, items=one.items[1:]), Encoded([1, 2, 3])).groups == [1, 0, 3]
    taken = [{"qs": ["a", "b"], "im": name, "options": ["1.png", "2.png"], "g": 1} for name in ("1.png", "2.png")]
    (one,) = read_sets(picking(folder, {"kind": "choice", "each": {"q": "qs"}}, rows=taken))
    assert one.drawn_with(range(4)) == [0, 0, 2, 2]
