"""How many tokens a model can read: its context length."""

import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from opdlab.errors import UsageError

# Names of learned or precomputed rows, one for each position: GPT-2's wpe, OPT's and GPT-J's embed_positions.
_TABLE = re.compile(r"\bwpe\b|pos(ition)?s?_?emb|embed_pos")
_MORE_ROWS = (0, 2)  # OPT's table begins two rows early
# Scalings of rotary embeddings whose factor is not yet in max_position_embeddings, or not in all configurations.
_SCALED = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class ContextLength:
    """The context length of a model.

    Args:
        tokens: of prompt and response together that the model was made for.
        fixed: True if it has a row for each position, and cannot read more; else more can be read, with positions that
            it was not trained on.
    """

    tokens: int
    fixed: bool

    def check(self, whose: str, prompt: int, key: str, new_tokens: int, where: str) -> None:
        """Refuse prompts and responses that do not fit, or warn if the model can read them all the same.

        Args:
            whose: key of the model.
            prompt: tokens of the longest prompt.
            key: of ``new_tokens``.
            new_tokens: most tokens of a response.
            where: the prompts are from.

        Raises:
            UsageError: they do not fit, and the length is fixed.

        Example:
            >>> ContextLength(128, True).check("model.student", 46, "max_new_tokens", 82, "data.train")
            >>> ContextLength(128, True).check("model.student", 46, "max_new_tokens", 176, "data.train")
            Traceback (most recent call last):
            opdlab.errors.UsageError: max_new_tokens is 176 and the longest prompt of data.train has 46 tokens, ...
        """
        if prompt + new_tokens <= self.tokens:
            return
        mend = f"lower {key}" + (f" to {self.tokens - prompt}" if prompt < self.tokens else "")
        said = (
            f"{key} is {new_tokens} and the longest prompt of {where} has {prompt} tokens, {prompt + new_tokens} "
            f"together, but {whose} {'has' if self.fixed else 'was made for'} {self.tokens} positions"
        )
        mend += ", leave longer prompts out (data.max_prompt_tokens), or take a model with a longer context"
        if self.fixed:
            raise UsageError(f"{said} and cannot read more: {mend}")
        rank_zero_warn(f"{said} (max_position_embeddings), and what it says beyond them may be worth little: {mend}")


def context_length(network: PreTrainedModel) -> ContextLength | None:
    """Return the context length of a network; None if it has none, as with ALiBi, or does not say.

    Args:
        network: a loaded causal language model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> context_length(GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=1, vocab_size=9)))
        ContextLength(tokens=64, fixed=True)
    """
    config: Any = network.config.get_text_config(decoder=True)
    tokens = getattr(config, "max_position_embeddings", None)
    if not isinstance(tokens, int) or tokens < 1:
        return None
    tensors = chain(network.named_parameters(), network.named_buffers())
    rows = [len(tensor) for name, tensor in tensors if tensor.ndim > 1 and _TABLE.search(name)]
    if any(count == tokens + more for count in rows for more in _MORE_ROWS):
        return ContextLength(tokens, fixed=True)
    scaling: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [each for each in scaling.values() if isinstance(each, dict)]  # by type of layer
    for each in nested or [scaling]:
        if each.get("rope_type", each.get("type")) in _SCALED and isinstance(each.get("factor"), int | float):
            tokens = max(tokens, int(each["factor"] * (each.get("original_max_position_embeddings") or tokens)))
    return ContextLength(tokens, fixed=False)
