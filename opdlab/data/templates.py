"""Templates turn a problem's text into prompt tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opdlab.errors import UsageError

REASONING_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Common suffix of prompts for mathematical problems."""


class Template(ABC):
    """Interface of templates."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the token ids of each problem's prompt."""


class RawTemplate(Template):
    r"""Template of plain text with a prefix and a suffix, for base models.

    Args:
        prefix: text before the problem.
        suffix: text after it, for example
            ``"\nPlease reason step by step, and put your final answer within \\boxed{}."``.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> tokenizer = chain_tokenizer()
        >>> tokenizer.decode(RawTemplate(suffix="\n").tokenize(["86 a+7"], tokenizer)[0])
        '86 a+7\n'
    """

    def __init__(self, prefix: str = "", suffix: str = "") -> None:
        self.prefix = prefix
        self.suffix = suffix

    def tokenize(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """See :meth:`Template.tokenize`."""
        whole = [f"{self.prefix}{text}{self.suffix}" for text in texts]
        ids: list[list[int]] = tokenizer(whole)["input_ids"]
        # Some tokenizers also put a token behind a text, mostly the stop token, after which nothing would follow.
        text, first = next(((text, tokens) for text, tokens in zip(whole, ids, strict=True) if text), ("", []))
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        numbers = range(len(first) - len(plain) + 1)  # of tokens behind the text
        behind = next((n for n in numbers if first[len(first) - n - len(plain) : len(first) - n] == plain), 0)
        return [tokens[: len(tokens) - behind] for tokens in ids]


class ChatTemplate(Template):
    """Template that puts the problem into a user turn of the tokenizer's chat template.

    Args:
        system: a system message, or None.
        suffix: text after the problem in the user turn.
        enable_thinking: passed to the template if not None; Qwen3's template reads it.

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def __init__(self, system: str | None = None, suffix: str = "", enable_thinking: bool | None = None) -> None:
        self.system = system
        self.suffix = suffix
        self.enable_thinking = enable_thinking

    def tokenize(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """See :meth:`Template.tokenize`."""
        if not tokenizer.chat_template:
            raise UsageError(
                "template is ChatTemplate, but the student's tokenizer has no chat template: use RawTemplate"
            )
        turns = [{"role": "system", "content": self.system}] if self.system else []
        chats = [[*turns, {"role": "user", "content": text + self.suffix}] for text in texts]
        options = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        encoded = tokenizer.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=True, **options
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids
