"""The check that the last layer's feed-forward part may be computed where states are read, and nowhere else.

Shapes: H hidden size.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from opdlab.policies.compiling import layers_of
from opdlab.policies.packing import state_errors
from opdlab.policies.passes import Pass

# Tokens of a compared row. Largest relative error of a state, in float32 and in narrower types; a layer that is not the
# last one, or a part that mixes positions, gives errors near 1.
_LENGTH, _ROUNDING, _NARROW_ROUNDING = 8, 1e-3, 1e-1


@torch.no_grad()
def last_feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """Return the feed-forward part of the last layer, for :meth:`opdlab.policies.passes.Pass.states`.

    The check runs the model: where states are read, they must be as before. They are not if another layer follows, or
    if the part mixes positions.

    Args:
        model: on the device on which it will run.

    Returns:
        None if the check fails, and for layers that are computed again in the backward pass, outside of a pass.
    """
    layers = layers_of(model)
    part = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(part, nn.Module) or "forward" in vars(part) or layers[-1].gradient_checkpointing:
        return None
    device, config = model.device, model.config.get_text_config()
    place = torch.arange(1, 2 * _LENGTH + 1, device=device)
    tokens = place * max(1, config.vocab_size // len(place)) % config.vocab_size  # spread over the vocabulary
    if config.pad_token_id is not None:  # transformers warns of padding without a mask
        tokens = torch.where(tokens == config.pad_token_id, (tokens + 1) % config.vocab_size, tokens)
    read = Pass(tokens.view(2, _LENGTH), torch.tensor([2, 5, _LENGTH - 1, _LENGTH + 3], device=device))
    try:
        apart = read.states(model.base_model, part)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes or returns something else
        return None
    narrow = apart.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
    errors = state_errors(apart, read.states(model.base_model))
    return part if float(errors.max()) <= (_NARROW_ROUNDING if narrow else _ROUNDING) else None
