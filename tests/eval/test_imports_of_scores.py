"""Files in the forms of lm_eval, lmms-eval and VLMEvalKit become score files that compare and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge import api
from ktmerge.errors import UsageError
from ktmerge.eval.results import Results

MARKS = {"base": [1, 1, 0, 1, 0, 1], "tuned": [1, 0, 0, 1, 1, 0]}


def sample(i: int, mark: float, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": i, "target": str(i % 3), "resps": [["a"]], "filtered_resps": ["a"], "doc_hash": f"hash {i}",
        "filter": "none", "metrics": ["acc"], "acc": mark,
        "arguments": {"gen_args_0": {"arg_0": f"question {i}", "arg_1": " a"}}, **more,
    }  # fmt: skip


def lm_eval(folder: Path, marks: list[int], *, samples: bool = True, shots: int = 0, task: str = "quiz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mean = float(np.mean(marks))
    document = {
        "results": {task: {"alias": task, "acc,none": mean, "acc_stderr,none": 0.2, "sample_len": len(marks)}},
        "n-shot": {task: shots}, "n-samples": {task: {"original": 99, "effective": len(marks)}},
        "lm_eval_version": "0.4.13", "model_name": f"/models/{folder.name}",
    }  # fmt: skip
    (folder / "results_2026-11-21T14-51-07.160522.json").write_text(json.dumps(document))
    if samples:
        lines = [json.dumps(sample(i, mark)) for i, mark in enumerate(marks)]
        (folder / f"samples_{task}_2026-11-21T14-51-07.160522.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return folder


def lmms_eval(folder: Path, marks: list[int]) -> Path:
    folder.mkdir(parents=True)
    document = {
        "results": {"mme": {"alias": "mme", "mme_score,none": 1234.5, "mme_score_stderr,none": "N/A"}},
        "n-shot": {"mme": 0},
    }
    (folder / "20261121_145107_results.json").write_text(json.dumps(document))
    rows = [
        {"doc_id": i, "target": "yes", "filtered_resps": ["Yes"], "doc_hash": f"h{i}", "input": f"question {i}",
         "mme_score": {"question_id": f"{i}.png", "category": "color", "score": float(mark)}}
        for i, mark in enumerate(marks)
    ]  # fmt: skip
    (folder / "20261121_145107_samples_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def vlmevalkit(folder: Path, marks: list[int]) -> Path:
    import pandas

    folder.mkdir(parents=True)
    name = folder.name
    rows = [
        {"index": i, "question": f"q {i}", "answer": "A", "prediction": "A", "hit": mark}
        for i, mark in enumerate(marks)
    ]
    pandas.DataFrame(rows).to_excel(folder / f"{name}_MMBench_DEV_EN_exact_matching_result.xlsx", index=False)
    pandas.DataFrame([{"split": "dev", "Overall": np.mean(marks)}]).to_csv(folder / f"{name}_MMBench_DEV_EN_acc.csv")
    pandas.DataFrame([{"Overall": 61.5}]).to_csv(folder / f"{name}_TextVQA_VAL_acc.csv")
    pandas.DataFrame([{"index": 1, "prediction": "cat"}]).to_csv(folder / f"{name}_TextVQA_VAL.tsv", sep="\t")
    (folder / f"{name}_OCRBench_score.json").write_text(json.dumps({"Final Score": 800, "Final Score Norm": 80.0}))
    return folder


@pytest.mark.slow
def test_items_of_lm_eval_are_paired(tmp_path: Path) -> None:
    files = [f"{name}={lm_eval(tmp_path / name, marks)}" for name, marks in MARKS.items()]
    results = api.import_scores(files, downstream=["quiz"], out=tmp_path / "scores.json")
    again = Results.load(tmp_path / "scores.json")
    assert {name: tasks["quiz"].scores.tolist() for name, tasks in again.scores.items()} == {
        name: marks[::-1] for name, marks in MARKS.items()
    }
    (task,) = again.tasks
    assert (task.kind, task.metric, task.side) == ("imported", "acc", "downstream")
    assert task.prompts[0] == "question 5"
    assert again.mcnemar("tuned", "base")["quiz"].only_b == 2
    assert again.warnings == []
    assert results.scores["base"]["quiz"].signature == "lm_eval 0.4.13"
    assert api.compare([tmp_path / "scores.json"]).summary.models["tuned"].E is not None
    assert api.report(tmp_path / "scores.json", tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_totals_alone_say_what_they_cannot(tmp_path: Path) -> None:
    files = [f"base={lm_eval(tmp_path / 'base', MARKS['base'])}",
             f"tuned={lm_eval(tmp_path / 'tuned', MARKS['tuned'], samples=False)}"]  # fmt: skip
    api.import_scores(files, out=tmp_path / "scores.json")
    results = Results.load(tmp_path / "scores.json")
    score = results.scores["tuned"]["quiz"]
    assert (score.mean, results.stderr("tuned", results.tasks[0])) == (50, 20)
    assert "only totals were imported" in results.warnings[0]
    assert results.mcnemar("tuned", "base") == {}
    change = results.summary.models["tuned"].F
    assert change is not None
    assert change.value == pytest.approx(100 * (3 - 4) / 6)
    assert change.high - change.low == pytest.approx(2 * 1.96 * np.hypot(20, 20), rel=0.1), "unpaired: errors add up"
    assert api.report(tmp_path / "scores.json", tmp_path / "report.html").is_file()


def test_lmms_eval_writes_some_scores_as_records(tmp_path: Path) -> None:
    files = [str(lmms_eval(tmp_path / name, marks)) for name, marks in MARKS.items()]
    results = api.import_scores(files)
    assert list(results.models) == ["base", "tuned"]
    assert {name: tasks["mme"].scores.tolist() for name, tasks in results.scores.items()} == MARKS
    assert results.tasks[0].metric == "mme_score"


def test_tables_of_vlmevalkit(tmp_path: Path) -> None:
    files = [str(vlmevalkit(tmp_path / name, marks)) for name, marks in MARKS.items()]
    results = api.import_scores(files, items=["TextVQA_VAL=5000", "OCRBench=1000"])
    assert {name: tasks["MMBench_DEV_EN"].scores.tolist() for name, tasks in results.scores.items()} == MARKS
    assert results.scores["base"]["OCRBench"].mean == 80
    text = results.scores["base"]["TextVQA_VAL"]
    assert text.total[1] == pytest.approx(100 * np.sqrt(0.615 * 0.385 / 5000))
    with pytest.raises(UsageError, match=r"neither items nor a standard error.*--items OCRBench=N"):
        api.import_scores(files, upstream=["MMBench_DEV_EN", "OCRBench"])


def test_answers_that_look_like_nothing_are_answers(tmp_path: Path) -> None:
    """pandas reads None and NA as missing numbers, which no score file can hold; so does lm_eval write NaN."""
    table = "index\tquestion\tanswer\tprediction\thit\n1\tq\tNone\tNA\t0\n2\tq\tNA\tNA\t1\n"
    (tmp_path / "m_VQA_result.tsv").write_text(table)
    sample_file = tmp_path / "samples_quiz_2026-11-21T14-51-07.1.jsonl"
    sample_file.write_text("".join(json.dumps(sample(i, 1.0, target=float("nan"))) + "\n" for i in range(2)))
    for file, references in ((tmp_path / "m_VQA_result.tsv", ["None", "NA"]), (sample_file, ["NaN", "NaN"])):
        api.import_scores([f"base={file}"], out=tmp_path / "scores.json", overwrite=True)
        assert Results.load(tmp_path / "scores.json").tasks[0].references == references


def test_a_groups_items_are_those_of_its_tasks(tmp_path: Path) -> None:
    for name, marks in MARKS.items():
        for task in ("one", "two"):
            lm_eval(tmp_path / name, marks, task=task)
        path = tmp_path / name / "results_2026-11-21T14-51-07.160522.json"
        document = json.loads(path.read_text())
        document["results"] |= {"one": document["results"]["two"], "both": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
        path.write_text(json.dumps({**document, "group_subtasks": {"both": ["one", "two"]}}))
    files = [f"{name}={tmp_path / name}" for name in MARKS]
    results = api.import_scores(files)
    assert [task.name for task in results.tasks] == ["both"]
    assert results.scores["tuned"]["both"].scores.tolist() == MARKS["tuned"][::-1] * 2


def test_a_total_is_a_fraction_or_percent_for_all_models(tmp_path: Path) -> None:
    for name, overall in (("base", 55.0), ("ruined", 0.8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_TextVQA_VAL_acc.csv").write_text(f"Overall\n{overall}\n")
    results = api.import_scores([str(tmp_path / "base"), str(tmp_path / "ruined")], items=["TextVQA_VAL=100"])
    assert [tasks["TextVQA_VAL"].mean for tasks in results.scores.values()] == [55.0, 0.8]


def test_what_is_better_when_less_is_no_score(tmp_path: Path) -> None:
    said = {"acc,none": 0.5, "acc_stderr,none": 0.1, "odds,none": 0.2, "odds_stderr,none": 0.1,
            "word_perplexity,none": 20.0, "word_perplexity_stderr,none": 1.0, "CIDEr,none": 0.9, "bleu,none": 0.9,
            "bleu_stderr,none": 0.1}  # fmt: skip
    document = {"results": {"quiz": said}, "higher_is_better": {"quiz": {"acc": True, "odds": False}}}
    (tmp_path / "results_1.json").write_text(json.dumps(document))
    files = [f"base={tmp_path}", f"tuned={tmp_path}"]
    assert api.import_scores(files).scores["base"]["quiz"].total == (50, 10)
    assert api.import_scores(files, metrics=["quiz=bleu"]).scores["base"]["quiz"].total == (0.9, 0.1)
    for metric in ("odds", "word_perplexity", "CIDEr"):
        with pytest.raises(UsageError, match=f"no metric '{metric}'"):
            api.import_scores(files, metrics=[f"quiz={metric}"])


def test_options_of_sets_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = f"base={lm_eval(tmp_path / 'base', MARKS['base'])}"
    for option in ({"items": ["quizz=3"]}, {"metrics": ["quizz=acc"]}):
        with pytest.raises(UsageError, match=r"'quizz' is none of the sets that are joined\. Did you mean 'quiz'"):
            api.import_scores([file], **option)
    with pytest.raises(UsageError, match="nothing to join"):
        api.import_scores([])


@pytest.mark.parametrize("name", ["samples_q_2026-11-21T14-51-07.1.jsonl", "m_OCRBench_score.json", "results_1.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{"])
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        api.import_scores([f"base={tmp_path / name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"marks": [1, 0]}, "was asked other items than the base"),
        ({"marks": MARKS["tuned"], "shots": 5}, "'base' was asked with {'shots': 0}, 'tuned' with {'shots': 5}"),
        ({"marks": MARKS["tuned"], "task": "quis"}, "'tuned' has no results on the set 'quiz'.*Did you mean 'quis'"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base, tuned = lm_eval(tmp_path / "base", MARKS["base"]), lm_eval(tmp_path / "tuned", **change)
    with pytest.raises(UsageError, match=message):
        api.import_scores([f"base={base}", f"tuned={tuned}"], out=tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "hello", "notes.txt: is not a result or sample file"),
        ("results_2026.json", "{}", "not a results file"),
        ("samples_quiz_2026-11-21T14-51-07.1.jsonl", "", "no samples in it"),
        ("samples_quiz_2026-11-21T14-51-07.1.jsonl", '{"doc_id": 0, "acc": 1}\n{"acc": 1}\n', "line 2: a sample has"),
        ("m_MMBench_acc.csv", "split\ndev\n", "none of Overall"),
        ("m_MMBench_result.csv", "index,hit\n1,1\n2,7\n", "row 3: 'hit' is 7"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        api.import_scores([f"base={tmp_path / name}"])
    assert name in str(caught.value)


def test_eval_import_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ktmerge.cli import main

    files = [f"{name}={lm_eval(tmp_path / name, marks)}" for name, marks in MARKS.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "import", *files, "--out", str(tmp_path / "scores.json")])
    assert not stopped.value.code
    assert "quiz" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "import", *files, "--out", str(tmp_path / "scores.json")])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "nowhere", "--base", str(tmp_path), "--suite", "nowhere.yaml"])
    assert stopped.value.code == 2
