"""Fixtures of more than one room."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).parent))  # the helper beside these tests
# Without bytecode each of the many processes would compile all of ktmerge, and each worker all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
_HANDLERS = {number: signal.getsignal(number) for number in _STOPPING}
gc.set_threshold(50_000, 20, 20)  # neither imports nor tests leave so much that looking more often would pay
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; several test processes share the cores


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A worker reports one outcome a test: five messages, most of which say that nothing happened, cost more."""
    if not hasattr(item.config, "workerinput") or item.config.getoption("durations") is not None:
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Every other worker collects backwards, so that two compile half of the files each and read the others'."""
    report = yield
    number = getattr(collector.config, "workerinput", {}).get("workerid", "gw0").removeprefix("gw")
    if isinstance(collector, pytest.Dir) and int(number) % 2:
        report.result = report.result[::-1]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One order in all workers. Of a test marked ``every(n)`` each n-th case is a unit test, the others are slow."""
    items.sort(key=lambda item: item.path)
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is not None and item.get_closest_marker("slow") is None:
            function = item.nodeid.partition("[")[0]
            if seen[function] % mark.args[0]:
                item.add_marker("slow")
            seen[function] += 1


def pytest_unconfigure() -> None:
    """A process that ends is not searched for garbage, which takes a second."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Nothing of a test depends on those before it: what it draws without a seed, and how it hears signals."""
    for number, handler in _HANDLERS.items():  # a command, run in this process, hears none once it is over
        signal.signal(number, handler)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(20_261)  # torch.manual_seed would load its compiler


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Nobody cuts the power during tests, and what was written is read back without this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "Is this review good or bad? This review is good. That one was bad, very bad indeed.",
    "user assistant system Question: Answer: yes no one two three four five six seven eight nine ten",
    "def add(first, second):\n    return first + second\n",
    "In the beginning the heaven and the earth were without form, and void.",
]


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_stays() -> None:
    """Modules and collected tests are not searched for garbage again each time that a run tidies its memory up."""
    if gc.get_count()[0] > 10_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, tied head, bfloat16, with a 400-token BPE and a ChatML template without marks.

    Treat the folder as read-only: the whole session shares it.
    """
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    build_tiny_llama(folder)
    return folder


def build_tiny_llama(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint of the ``tiny_llama`` fixture; the same bytes for the same seed."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE of 400 tokens, trained here, with the ChatML tokens; ``<|im_end|>`` ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def toy_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and tuned checkpoint of a few small fp32 tensors under a Llama's names; made without torch. Read-only."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.norm.weight": (8,),
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    folders = []
    for seed, name in enumerate(("base", "tuned")):
        folder = tmp_path_factory.mktemp("toy") / name
        folder.mkdir()
        numbers = np.random.default_rng(seed)
        tensors = {key: numbers.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders[0], folders[1]
