"""Side-by-side answers: what each model says to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.limits import context_length
from ktmerge.eval.encode import Encoder
from ktmerge.eval.evaluation import free_memory
from ktmerge.eval.generate import generate
from ktmerge.eval.loading import choose_device, choose_dtype, load_model, load_tokenizer
from ktmerge.eval.results import Generation
from ktmerge.progress import SILENT, Progress


def generations(
    models: Mapping[str, Path],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    notes: Sequence[str] = (),
    device: str = "auto",
    progress: Progress = SILENT,
) -> list[Generation]:
    """Let every model answer every prompt greedily; one model in memory at a time.

    Args:
        models: names and checkpoint folders, in the order to show them.
        prompts: the prompts.
        max_new_tokens: length of an answer.
        notes: what to say beside each prompt, if anything.
        device: auto, cpu or cuda.
        progress: where to report to.

    Raises:
        UsageError: a checkpoint or tokenizer cannot be used.
        KtmergeError: the run failed.
    """
    target = choose_device(device)
    outputs: list[dict[str, str]] = [{} for _ in prompts]
    for name, path in models.items():
        tokenizer = load_tokenizer(Path(path))
        length = context_length(Checkpoint.open(Path(path)).config)
        encoder = Encoder(tokenizer, length)
        ids = [encoder.ids(prompt) for prompt in prompts]
        model = load_model(Path(path), target, choose_dtype(target))
        try:
            answers = generate(
                model, tokenizer, ids, max_new_tokens=max_new_tokens, progress=progress, label=f"{name}: samples"
            )
        finally:
            del model
            free_memory(target)
        for found, answer in zip(outputs, answers, strict=True):
            found[name] = answer
    said = [*notes, *[""] * (len(prompts) - len(notes))]
    return [Generation(*one) for one in zip(prompts, outputs, said, strict=True)]
