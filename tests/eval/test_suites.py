"""The ready suites on small copies of the datasets' schemas, with contents made up here."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import read_sets
from ktmerge.eval.items import ChoiceItem, GenerateItem, InstructionsItem, LetterItem, whole_prompt
from ktmerge.eval.marking import mark
from ktmerge.eval.rows import PARTS, load, of_part
from ktmerge.eval.shaping import joined, kept, taken_apart
from ktmerge.recipes import load_suite, ready
from ktmerge.recipes.combining import load_suites
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import Suite

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(colour: int) -> dict[str, Any]:
    """A cell of a Hugging Face Image column, as parquet holds it."""
    image = pytest.importorskip("PIL.Image")
    held = io.BytesIO()
    image.new("RGB", (12, 10), (colour, 90, 200)).save(held, format="PNG")
    return {"bytes": held.getvalue(), "path": f"{colour}.png"}


SUBJECTS = ("abstract_algebra", "anatomy")
DATA: dict[str, list[dict[str, Any]]] = {
    "cais/mmlu/all/test": [
        {"question": f"What is {i}? ", "subject": SUBJECTS[i % 2], "choices": ["a", "b", "c", f"d{i}"], "answer": i}
        for i in range(4)
    ],
    "cais/mmlu/all/dev": [
        {"question": f"Dev {i}", "subject": SUBJECTS[i // 5], "choices": ["w", "x", "y", "z"], "answer": i % 4}
        for i in range(10)
    ],
    "openai/gsm8k/main/test": [{"question": "How many?", "answer": "One and one.\n#### 1,002"}],
    "openai/gsm8k/main/train": [{"question": f"Train {i}?", "answer": f"Think {i}.\n#### {i}"} for i in range(6)],
    "google/IFEval/train": [
        {"key": 1000, "prompt": "Say it without commas, in at least 2 words.",
         "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
         "kwargs": [{"relation": None, "num_words": None}, {"relation": "at least", "num_words": 2}]},
    ],
    "lmms-lab/OK-VQA/val2014": [
        {"question_id": "1", "image": png(1), "question": "What sport is this?", "question_type": "x",
         "answers": ["surf"] * 2 + ["surfing"] * 8, "answer_type": "other"},
    ],
    "lmms-lab/GQA/testdev_balanced_instructions/testdev": [
        {"id": "7", "imageId": "n1", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is.",
         "isBalanced": True},
    ],
    "lmms-lab/GQA/testdev_balanced_images/testdev": [{"id": "n0", "image": png(0)}, {"id": "n1", "image": png(11)}],
    "lmms-lab/textvqa/validation": [
        {"image_id": "a", "question_id": 3, "question": "what is the brand?", "question_tokens": ["what"],
         "image": png(2), "image_width": 12, "image_height": 10, "answers": ["nokia"] * 9 + ["no"],
         "image_classes": ["phone"], "set_name": "val", "ocr_tokens": ["NOKIA"]},
    ],
    "howard-hou/OCR-VQA/test": [
        {"image": png(3), "image_id": "b", "questions": ["Who wrote this?", "Is it a comic?"],
         "answers": ["Ann Author", "No"], "ocr_tokens": [], "title": "T", "authorName": "Ann Author", "genre": "G"},
    ],
    "lmms-lab/COCO-Caption2017/val": [
        {"question_id": f"{i}.jpg", "image": png(20 + i), "question": "Describe", "id": i,
         "answer": [f"A dog number {i}.", "Some dog on a lawn"]} for i in range(2)
    ],
    "lmms-lab/flickr30k/test": [
        {"image": png(30 + i), "caption": [f"Two men {i}", "People in a street."], "sentids": ["1", "2"],
         "img_id": str(i), "filename": "x.jpg"} for i in range(2)
    ],
    "lmms-lab/ScienceQA/ScienceQA-IMG/test": [
        {"image": png(4), "question": "Which is warm?", "choices": ["ice", "fire"], "answer": 1, "hint": hint,
         "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "t", "category": "c",
         "skill": "s", "lecture": "", "solution": ""} for hint in ("", "Look closely.")
    ],
    "flaviagiammarino/path-vqa/test": [
        {"image": png(5), "question": "Is this a cell?", "answer": "yes"},
        {"image": png(6), "question": "What is shown?", "answer": "the epithelial layer"},
    ],
    "lmms-lab/ICON-QA/val": [
        {"question_id": "1", "question": "How many?", "choices": "3,8,6", "answer": "8", "query_image": png(7),
         "choice_image_0": None, "choice_image_1": None, "ques_type": "choose_txt", "label": "l", "grade": "g",
         "skills": "s"},
        {"question_id": "2", "question": "What time?", "choices": "", "answer": "4", "query_image": png(8),
         "choice_image_0": None, "choice_image_1": None, "ques_type": "fill_in_blank", "label": "l", "grade": "g",
         "skills": "s"},
        {"question_id": "3", "question": "Which?", "choices": "choice_0.png,choice_1.png",
         "answer": "choice_1.png", "query_image": png(9), "choice_image_0": png(1), "choice_image_1": png(2),
         "ques_type": "choose_img", "label": "l", "grade": "g", "skills": "s"},
        {"question_id": "4", "question": "Which?", "choices": "choice_0.png,choice_1.png,choice_2.png,choice_3.png",
         "answer": "choice_3.png", "query_image": png(9), "choice_image_0": png(1), "choice_image_1": png(2),
         "ques_type": "choose_img", "label": "l", "grade": "g", "skills": "s"},
    ],
    "lmms-lab/ai2d/test": [
        {"question": "What eats the frog?", "options": ["hawk", "grass", "sun", "moss"], "answer": "0",
         "image": png(10)},
    ],
}  # fmt: skip


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of copies of the datasets' repositories, and RSVQA's own files."""
    import pyarrow
    import pyarrow.parquet

    for name, rows in DATA.items():
        *folders, split = name.split("/")
        if "IFEval" in folders:  # its repository has one file of another name
            (tmp_path / "google" / "IFEval").mkdir(parents=True)
            (tmp_path / "google" / "IFEval" / "ifeval_input_data.jsonl").write_text("\n".join(map(json.dumps, rows)))
            continue
        folder = tmp_path.joinpath(*folders, *(["data"] if len(folders) == 2 else []))
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    images = tmp_path / "RSVQA_LR" / "Images_LR"
    images.mkdir(parents=True)
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (16, 16), (9, 9, 9)).save(images / "17.tif")
    questions = [
        {"id": 0, "active": False},
        {"id": 1, "date_added": 0.5, "img_id": 17, "people_id": 0, "type": "presence", "question": "Is a road present?",
         "answers_ids": [4], "active": True},
    ]  # fmt: skip
    answers = [{"id": 0, "active": False}, {"id": 4, "people_id": 0, "answer": "yes", "question_id": 1, "active": True}]
    for kind, rows in (("questions", questions), ("answers", answers)):
        file = tmp_path / "RSVQA_LR" / f"LR_split_test_{kind}.json"
        file.write_text(json.dumps({kind: rows}, indent=None if kind == "answers" else 1))
    monkeypatch.setenv("KTMERGE_DATASETS", str(tmp_path))
    return tmp_path


def sets_of(name: str) -> dict[str, Any]:
    return {one.task.name: one for one in read_sets(load_suite(name))}


def test_what_a_language_model_knew(copies: Path) -> None:
    sets = sets_of("upstream-llm")
    mmlu, gsm8k, ifeval = (sets[name] for name in ("mmlu", "gsm8k", "ifeval"))
    item = mmlu.items[1]
    assert isinstance(item, ChoiceItem)
    shots = "".join(
        f"Dev {i}\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[i % 4]}\n\n" for i in range(5, 10)
    )  # of its own subject, in their order
    assert whole_prompt(item) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{shots}What is 1?\nA. a\nB. b\nC. c\nD. d1\nAnswer:"
    )
    assert (item.continuations(), item.answer) == ([" A", " B", " C", " D"], 1)
    item = gsm8k.items[0]
    assert isinstance(item, GenerateItem)
    assert item.answers == ("1,002",)
    assert re.search(r"Question: Train (\d)\?\nAnswer: Think \1\.\n#### \1\n\nQuestion: ", whole_prompt(item))
    assert whole_prompt(item).endswith("Question: How many?\nAnswer:")
    said = "So 1,002.\n#### 1002\n\nThat is #### 7"
    assert mark(gsm8k, [said]).mean == 100, "the first number counts, with or without commas"
    item = ifeval.items[0]
    assert isinstance(item, InstructionsItem)
    assert mark(ifeval, ["Fine, sir"]).figures == {
        "prompt_loose": 0, "instruction_strict": 50, "instruction_loose": 50
    }  # fmt: skip
    assert mark(ifeval, ["Fine then"]).mean == 100


def test_what_a_vision_language_model_could_do(copies: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    sets = sets_of("upstream-vlm")
    for name, prompt, answers, colour in (
        ("okvqa", "What sport is this?" + PHRASE, ("surf",) * 2 + ("surfing",) * 8, 1),
        ("gqa", "Is it red?" + PHRASE, ("yes",), 11),
        ("textvqa", "What is the brand?" + PHRASE, ("nokia",) * 9 + ("no",), 2),
        ("coco-caption", "Provide a one-sentence caption for the provided image.",
         ("A dog number 0.", "Some dog on a lawn"), 20),
        ("flickr30k", "Provide a one-sentence caption for the provided image.",
         ("Two men 0", "People in a street."), 30),
    ):  # fmt: skip
        item = sets[name].items[0]
        assert isinstance(item, GenerateItem)
        assert (item.prompt, item.answers) == (prompt, answers)
        assert [image.open().getpixel((0, 0)) for image in item.images] == [(colour, 90, 200)]
    assert [(item.prompt, item.answers) for item in sets["ocrvqa"].items] == [
        ("Who wrote this?" + PHRASE, ("Ann Author",)), ("Is it a comic?" + PHRASE, ("No",)),
    ]  # fmt: skip
    assert mark(sets["okvqa"], ["Surf."]).mean == pytest.approx(60)
    assert mark(sets["textvqa"], ["Nokia"]).mean == 100
    assert mark(sets["gqa"], ["Yes."]).mean == mark(sets["ocrvqa"], ["ann author", "no"]).mean == 100
    assert mark(sets["coco-caption"], ["a dog number 0", "a dog number 1"]).mean > 100
    assert not any(getattr(item, "images", ()) for name in ("mmlu", "gsm8k", "ifeval") for item in sets[name].items)


def test_what_is_learned_downstream(copies: Path) -> None:
    science = sets_of("downstream-scienceqa")["scienceqa"]
    assert all(isinstance(item, LetterItem) and item.answer == 1 and item.images for item in science.items)
    assert [item.prompt for item in science.items] == [
        "Which is warm?\nA. ice\nB. fire" + LETTER, "Context: Look closely.\nWhich is warm?\nA. ice\nB. fire" + LETTER,
    ]  # fmt: skip
    pathology = sets_of("downstream-pathvqa")
    assert mark(pathology["pathvqa-closed"], ["Yes"]).mean == 100
    assert mark(pathology["pathvqa-open"], ["epithelial cells"]).mean == pytest.approx(50)
    icons = sets_of("downstream-iconqa")
    assert [(item.choices, item.answer) for item in icons["iconqa-text"].items] == [(("3", "8", "6"), 1)]
    assert [item.answers for item in icons["iconqa-blank"].items] == [("4",)]
    (pictures,) = icons["iconqa-image"].items
    assert [image.data for image in pictures.images] == [png(i)["bytes"] for i in (9, 1, 2)]
    assert pictures.prompt.startswith("<image>Question: Which?\nOptions:\nA. <image>\nB. <image>\nAnswer")
    assert pictures.answer == 1
    assert mark(icons["iconqa-image"], ["B"]).mean == 100
    (satellite,) = sets_of("downstream-rsvqa")["rsvqa"].items
    assert (satellite.prompt, satellite.answers, len(satellite.images)) == ("Is a road present?" + PHRASE, ("yes",), 1)
    (diagram,) = sets_of("downstream-ai2d")["ai2d"].items
    assert (diagram.choices[diagram.answer], len(diagram.images)) == ("hawk", 1)


def test_all_ready_suites_are_tested_here() -> None:
    assert set(ready.names()) == {"upstream-llm", "upstream-vlm"} | {
        f"downstream-{name}" for name in ("ai2d", "iconqa", "pathvqa", "rsvqa", "scienceqa")
    }


def test_suites_together(copies: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "mine" / "s.yaml").write_text("upstream:\n- {name: own, kind: text, data: x.jsonl}\n")
    both = load_suites(["downstream-rsvqa", tmp_path / "mine" / "s.yaml"])
    assert [one.task.name for one in read_sets(both)] == ["own", "rsvqa"]
    assert [one.digest for one in read_sets(both)][1] == sets_of("downstream-rsvqa")["rsvqa"].digest
    with pytest.raises(UsageError, match="have a set called 'gsm8k'"):
        load_suites(["upstream-llm", "upstream-vlm"])
    with pytest.raises(UsageError, match=r"neither a file nor a ready suite\. Did you mean 'upstream-vlm'"):
        load_suites(["upstream-vml"])


def test_a_dataset_that_is_not_there_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached: the library is told so, as where there is no network."""
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.delenv("KTMERGE_DATASETS", raising=False)
    with pytest.raises(UsageError, match=r"task 'mmlu': hf:cais/mmlu: the dataset is not on this machine and the hub "):
        read_sets(load_suite("upstream-llm"))


def test_images_of_a_dataset_are_left_as_files(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"image": Image(), "more": List(Image()), "q": Value("string")})
    rows = {"image": [png(1), None], "more": [[png(2), png(3)], []], "q": ["a", "b"]}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "test.parquet")
    found = load(f"hf:{tmp_path / 'set'}", tmp_path, None, "test")
    assert found.rows[0].values["image"]["bytes"] == png(1)["bytes"]
    task = {"name": "t", "kind": "generate", "data": f"hf:{tmp_path / 'set'}", "split": "test", "prompt": "{{ q }}",
            "answer": "x", "image": ["image", "more"]}  # fmt: skip
    (one,) = read_sets(Suite(upstream=[task], folder=tmp_path))
    assert [len(item.images) for item in one.items if isinstance(item, GenerateItem)] == [3, 0]


def test_cider_of_one_item_is_refused_before_scoring(copies: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    suite = load_suite("upstream-vlm")
    captions = [task.model_copy(update={"limit": 1}) for task in suite.upstream if task.name == "flickr30k"]
    with pytest.raises(UsageError, match="task 'flickr30k': CIDEr of a single item is always 0"):
        read_sets(suite.model_copy(update={"upstream": captions}))


ROWS = [Row(0, "x:1", {"a": [1, 2], "b": ["p", "q"], "id": 5}), Row(1, "x:2", {"a": [], "b": [], "id": 6})]


def test_lists_are_taken_apart() -> None:
    found = taken_apart(ROWS, {"one": "a", "b": "b"}, "t")
    assert [(row.number, row.where, row.values["one"], row.values["b"]) for row in found] == [
        (0, "x:1, number 1", 1, "p"), (1, "x:1, number 2", 2, "q"),
    ]  # fmt: skip
    for each, said in (
        ({"one": "c"}, "x:1 has no column 'c'"), ({"one": "id"}, "x:1 has 5 in 'id', a list is needed"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(said)):
            taken_apart(ROWS, each, "t")
    uneven = [Row(0, "x:1", {"a": [1], "b": []})]
    with pytest.raises(UsageError, match="x:1 has lists of different lengths: 1 in 'a', 0 in 'b'"):
        taken_apart(uneven, {"a": "a", "b": "b"}, "t")


def test_columns_of_other_data_are_joined() -> None:
    others = [Row(0, "y:1", {"key": "5", "id": 99, "image": "i"}), Row(1, "y:2", {"key": 6, "image": "j"})]
    assert [row.values["image"] for row in joined(ROWS, others, "id", "key", "t")] == ["i", "j"]
    assert [row.values["id"] for row in joined(ROWS, others, "{{ id }}", "key", "t")] == [5, 6], "a row's own stay"
    for rows, by, said in (
        (others[:1], "id", "x:2 asks for key '6', which is in none of the 1 rows"),
        (others, "idd", "x:1 has no column 'idd'"),
        ([others[0], others[0]], "id", "'5' stands in y:1 and in y:1"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            joined(ROWS, rows, by, "key", "t")


def test_rows_are_left_out() -> None:
    assert [row.number for row in kept(ROWS, "{{ id > 5 }}", "t")] == [1]
    with pytest.raises(UsageError, match="true for none of the 2 rows"):
        kept(ROWS, "{{ id > 9 }}", "t")
    with pytest.raises(UsageError, match=r"must be one \{\{ expression \}\}"):
        kept(ROWS, "id > 5", "t")


def test_one_json_object_with_one_list_holds_rows(tmp_path: Path) -> None:
    for text in ('{"info": {"v": 1}, "rows": [{"a": 1}, {"a": 2}]}', '{\n"rows": [{"a": 1},\n {"a": 2}]}'):
        (tmp_path / "x.json").write_text(text)
        found = load("x.json", tmp_path, None, None)
        assert [(row.values["a"], row.where.rsplit(", ")[-1]) for row in found.rows] == [
            (1, "rows row 1"),
            (2, "rows row 2"),
        ]
    (tmp_path / "chat.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert len(load("chat.json", tmp_path, None, None).rows[0].values["messages"]) == 1


@pytest.mark.parametrize("key", [{"shots_by": "q"}, {"shot": "x"}, {"shots_from": "x"}])
def test_keys_of_worked_examples_need_some(key: dict[str, str]) -> None:
    task = {"name": "t", "kind": "generate", "data": "x", "prompt": "q", "answer": "a"}
    with pytest.raises(ValueError, match="need shots, how many there are"):
        Suite(upstream=[{**task, **key}])


def test_what_one_row_is_taken_apart_into_is_in_one_part() -> None:
    rows = [Row(number, f"x:{number}", {"a": [1, 2, 3], "id": number}) for number in range(40)]
    others = [Row(number, f"y:{number}", {"key": str(number)}) for number in range(40)]
    apart = joined(taken_apart(rows, {"one": "a"}, "t"), others, "id", "key", "t")
    chosen, reported = ({row.values["id"] for row in of_part(apart, 0.5, part)} for part in PARTS[1:])
    assert chosen
    assert reported
    assert not chosen & reported
