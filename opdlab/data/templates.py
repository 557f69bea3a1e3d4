"""Templates turn a problem's text into prompt tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from opdlab.errors import UsageError, require
from opdlab.types import Message

Chat = Sequence[Message]
"""The turns of a problem; the last one is the user's."""
REASONING_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Common suffix of prompts for mathematical problems."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def check_fields(text: str, key: str) -> None:
    """Raise a UsageError that begins with ``key`` if a text names no field in braces."""
    require(
        any(match[1] for match in _FIELD.finditer(text)),
        f"{key} is {text!r}, which names no field: put a name in braces, such as '{{problem}} {{solution}}'",
    )


def fill_fields(text: str, value: Callable[[str], str]) -> str:
    r"""Return a text with each name in braces replaced by the field's value; doubled braces stay as single ones.

    Args:
        text: with names such as ``{problem}``. Empty braces are no name.
        value: returns the text of a field.

    Example:
        >>> fill_fields(r"{problem} = \boxed{} {{x}}", {"problem": "1 + {a}"}.__getitem__)
        '1 + {a} = \\boxed{} {x}'
    """
    return _FIELD.sub(lambda match: value(match[1]) if match[1] else match[0][0], text)


class Template(ABC):
    """Interface of templates."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the token ids of the prompt of each plain text."""

    def tokenize_chats(self, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the token ids of the prompt of each chat.

        Raises:
            UsageError: the template takes plain text only.
        """
        raise UsageError(
            f"template is {type(self).__name__}, which takes plain text, but the problems are lists of messages: give "
            "opdlab.data.ChatTemplate, or leave the template out"
        )


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

    A problem that is a chat keeps its turns and its own system message.

    Args:
        system: system message of problems that have none, or None.
        suffix: text after the problem in the last user turn.
        enable_thinking: passed to the template if not None; Qwen3's template reads it.
        options: further names that the template reads, such as Llama 3's ``date_string``, and their values.

    Raises:
        UsageError: the tokenizer has no chat template, or its template refuses the messages.
    """

    def __init__(
        self,
        system: str | None = None,
        suffix: str = "",
        enable_thinking: bool | None = None,
        options: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        self.system = system
        self.suffix = suffix
        self.options = dict(options or {})
        if enable_thinking is not None:
            self.options["enable_thinking"] = enable_thinking

    def tokenize(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """See :meth:`Template.tokenize`."""
        require(
            bool(tokenizer.chat_template),
            "template is ChatTemplate, but the student's tokenizer has no chat template: use RawTemplate",
        )
        return self.tokenize_chats([[Message("user", text)] for text in texts], tokenizer)

    def tokenize_chats(self, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """See :meth:`Template.tokenize_chats`."""
        require(
            bool(tokenizer.chat_template),
            "the problems are lists of messages, but the student's tokenizer has no chat template: give a student with "
            "one, or plain text as the problem",
        )
        encode = partial(
            tokenizer.apply_chat_template, tokenize=True, add_generation_prompt=True, return_dict=True, **self.options
        )
        turns = [self._turns(chat) for chat in chats]
        try:
            ids: list[list[int]] = encode(turns)["input_ids"]
        except Exception:  # a template is a program, which may raise anything
            for each in turns:
                try:
                    encode(each)
                except Exception as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    roles, text = ", ".join(turn["role"] for turn in each), each[-1]["content"][:40]
                    raise UsageError(
                        f"the student's chat template refuses the problem {text!r}, messages of {roles}: {reason}; "
                        "change the messages, the template's system message, or the student's tokenizer"
                    ) from error
            raise
        return ids

    def _turns(self, chat: Chat) -> list[dict[str, str]]:
        *earlier, last = chat
        turns = [*earlier, Message(last.role, last.content + self.suffix)]
        if self.system and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        return [{"role": turn.role, "content": turn.content} for turn in turns]


class DefaultTemplate(RawTemplate):
    """Template of problems without one: plain text stays as it is, a chat goes through the tokenizer's template."""

    def tokenize_chats(self, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """See :meth:`Template.tokenize_chats`."""
        return ChatTemplate().tokenize_chats(chats, tokenizer)
