"""Characters of the data that the tokenizer does not know."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from opdlab.types import Problem


@dataclass(frozen=True)
class UnknownText:
    """The number of texts of one kind that the tokenizer does not know as a whole, and the first one of them.

    Args:
        kind: ``prompts``, ``prompts that the teacher sees`` or ``demonstrations``.
        count: number of texts.
        problem: the problem of the first one.
        piece: what the tokenizer does not know in it; empty if it stands in a template.
    """

    kind: str
    count: int
    problem: Problem
    piece: str


class UnknownTexts:
    """Counts the texts with characters that the tokenizer replaces by its unknown token, or leaves out.

    White space and control characters do not count, because many tokenizers leave them out on purpose.

    Args:
        tokenizer: the student's.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> tokenizer, problem = chain_tokenizer(), Problem("7", "1 + é", None)
        >>> texts = UnknownTexts(tokenizer)
        >>> texts.look("prompts", problem, ["1 + é"], tokenizer("1 + é")["input_ids"])
        >>> [(each.kind, each.count, each.piece) for each in texts.found]
        [('prompts', 1, 'é')]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        # GPT-2 and its like know all bytes, and name the token that ends a text as their unknown one.
        self._unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id
        self._seen: set[str] = set()
        self._left_out: set[str] = set()
        self._found: dict[str, UnknownText] = {}

    @property
    def found(self) -> tuple[UnknownText, ...]:
        """Return the texts that are not known as a whole, by kind."""
        return tuple(self._found.values())

    def look(self, kind: str, problem: Problem, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Count a text of a problem if it is not known as a whole.

        Args:
            kind: see :class:`UnknownText`.
            problem: the problem.
            texts: the parts of the text that come from the data.
            tokens: token ids of the whole text.
        """
        characters = set[str]().union(*texts)
        if new := characters - self._seen:
            self._seen |= new
            self._left_out |= self._without_token(new)
        lost = not characters.isdisjoint(self._left_out)
        if self._unknown is not None and not lost:
            written = sum(text.count(str(self._tokenizer.unk_token)) for text in texts)
            lost = list(tokens).count(self._unknown) > written
        if not lost:
            return
        before = self._found.get(kind)
        if before is None:
            self._found[kind] = UnknownText(kind, 1, problem, self._first_piece(texts))
        else:
            self._found[kind] = replace(before, count=before.count + 1)

    def _without_token(self, characters: set[str]) -> set[str]:
        """Return the characters that become no token, or the one of white space."""
        nothing = [[], self._tokens(" ")]
        return {each for each in characters if each.isprintable() and each != " " and self._tokens(each) in nothing}

    def _tokens(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # a tokenizer without an unknown token may refuse a character that is known within a word
            return [-1]
        return ids

    def _first_piece(self, texts: Sequence[str]) -> str:
        """Return the first piece of the texts that the tokenizer does not know; empty if it does not tell."""
        for text in texts:
            for character in text:
                if character in self._left_out:
                    return character
            if self._unknown is not None and self._tokenizer.is_fast:
                made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True):
                    if token == self._unknown and text[start:end] != self._tokenizer.unk_token:
                        return text[start:end]
        return ""
