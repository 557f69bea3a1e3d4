"""How an architecture turns hidden states into logits, and the comparison by which an unknown way is noticed.

Shapes: N positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opdlab.errors import UsageError
from opdlab.policies.adapters import base_of
from opdlab.scoring import Head

# The logits that the comparison goes up to. A soft cap far above what a model puts out is the identity on its logits
# until training makes them grow; caps in use are 15 to 50.
_LARGE_LOGIT = 1000.0
# float16 ends at 65504.
_LARGE_STATE = 1e4


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that holds the head's weight and bias, below an adapter where it has one."""
    layer: nn.Linear = base_of(model.get_output_embeddings())
    return layer


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head, path: str, num_tokens: int) -> None:
    """Compare our head with the model's own on a few tokens, on its hidden states as they are and much enlarged.

    Args:
        model: in eval mode.
        head: ours, at temperature 1.
        path: named in the message.
        num_tokens: size of the vocabulary that the tokenizer knows.

    Raises:
        UsageError: the logits differ: the architecture does something to them that :class:`Head` does not know.
    """
    tokens = torch.arange(min(8, num_tokens), device=head.weight.device).view(1, -1)
    with _attention_of_any_device(model):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        _, own = _forward(model, tokens, 1.0)
        largest = float(replace(head, bias=None, softcap=None).tile(hidden, slice(None)).abs().amax())
        factor = min(_LARGE_LOGIT / max(largest, 1e-3), _LARGE_STATE / max(float(hidden.abs().amax()), 1e-3))
        enlarged = _forward(model, tokens, factor)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    for states, logits in ((hidden, own), enlarged):
        ours = head.tile(states, slice(None))
        size = float(ours.abs().amax().nan_to_num(1.0).clamp(min=1))
        if not torch.allclose(logits, ours, rtol=tolerance, atol=tolerance * size):
            raise UsageError(
                f"model '{path}' ({type(model).__name__}) changes its logits in a way that opdlab does not "
                "know, so its log-probabilities would be wrong: choose another architecture"
            )


def _forward(model: PreTrainedModel, tokens: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """What enters the output layer, times ``factor``, [N, H], and what the model makes of it, [N, V]."""
    seen: list[Tensor] = []

    def enlarge(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(inputs[0] * factor)
        return (seen[-1],)

    # On an adapter's own layer, where there is one: it reads the states too.
    hook = model.get_output_embeddings().register_forward_pre_hook(enlarge)
    try:
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    finally:
        hook.remove()
    if not seen:  # a model that goes around its output layer cannot be compared; zeros do not give its logits
        seen.append(torch.zeros(*tokens.shape, output_layer(model).weight.shape[1], device=tokens.device))
    return seen[-1][0], logits[0].float()


@contextmanager
def _attention_of_any_device(model: PreTrainedModel) -> Iterator[None]:
    """Models are loaded on the host, where kernels for accelerators do not run; the head is the same with all."""
    own = model.config._attn_implementation
    if own in (None, "eager", "sdpa") or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
