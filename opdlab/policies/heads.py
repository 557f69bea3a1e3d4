"""Checks of a model's weights: they are finite, and our head computes the logits of its output layer.

Shapes: N positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opdlab.errors import UsageError, require
from opdlab.policies.adapters import base_of
from opdlab.policies.loading import non_finite
from opdlab.scoring import Head

# Largest logit in the comparison. A soft cap far above a model's logits has no effect until training makes the logits
# grow; caps in use are 15 to 50.
_LARGE_LOGIT = 1000.0
# The largest float16 is 65504.
_LARGE_STATE = 1e4


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that holds the head's weight and bias (the base layer if it has an adapter)."""
    layer: nn.Linear = base_of(model.get_output_embeddings())
    return layer


def check_weights(model: PreTrainedModel, path: str) -> int:
    """Return the number of ids for which embedding and output layer have a row.

    Args:
        model: loaded.
        path: path of the model, for messages.

    Raises:
        UsageError: the model has no output layer, or NaN or infinite weights.
    """
    head = output_layer(model)
    require(
        isinstance(getattr(head, "weight", None), Tensor),
        f"model '{path}' has no output layer: give a causal language model",
    )
    broken = non_finite(model.named_parameters())
    require(
        broken is None,
        f"model '{path}' has NaN or infinite weights, first in {broken}: write the folder again, or give an earlier "
        "export or checkpoint",
    )
    embedding: nn.Embedding = base_of(model.get_input_embeddings())
    return min(len(embedding.weight), len(head.weight))


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head, path: str, num_tokens: int) -> None:
    """Raise a UsageError if our head's logits differ from the model's, for original or much larger hidden states.

    The comparison runs the model on a few tokens.

    Args:
        model: in eval mode.
        head: ours, at temperature 1.
        path: path of the model, for the message.
        num_tokens: size of the tokenizer's vocabulary.

    Raises:
        UsageError: the logits differ, because the architecture changes them in a way that :class:`Head` lacks.
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
    """Return the output layer's input times ``factor``, [N, H], and the model's logits for it, [N, V]."""
    seen: list[Tensor] = []

    def enlarge(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(inputs[0] * factor)
        return (seen[-1],)

    # Hook the adapter's layer if there is one: it reads the states too.
    hook = model.get_output_embeddings().register_forward_pre_hook(enlarge)
    try:
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    finally:
        hook.remove()
    if not seen:  # the model bypasses its output layer: zero states make the comparison fail
        seen.append(torch.zeros(*tokens.shape, output_layer(model).weight.shape[1], device=tokens.device))
    return seen[-1][0], logits[0].float()


@contextmanager
def _attention_of_any_device(model: PreTrainedModel) -> Iterator[None]:
    """Use eager attention on the host, where accelerator kernels do not run; the head does not depend on the kernel."""
    own = model.config._attn_implementation
    if own in (None, "eager", "sdpa") or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
