"""The last layer's feed-forward part is computed where states are read, and nowhere else, if a check allows it.

Shapes: H hidden size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opdlab.policies.compiling import layers_of
from opdlab.policies.packing import state_errors
from opdlab.policies.passes import Pass, at_read_positions

# Tokens of a compared row. Largest relative error of a state, in float32 and in narrower types; a part that mixes
# positions gives errors near 1.
_LENGTH, _ROUNDING, _NARROW_ROUNDING = 8, 1e-3, 1e-1


@torch.no_grad()
def prepare(model: PreTrainedModel) -> str | None:
    """Let passes leave out the last layer's feed-forward part where they read no states.

    The check runs the model. Whatever the part returns elsewhere, the states that are read must be bitwise the same: no
    layer follows that reads others. And they must be those of the whole part: it does not mix positions. Forward hooks
    on the part then see zeros where it was left out.

    Args:
        model: on the device on which it will run; the part's ``forward`` is replaced if the check succeeds.

    Returns:
        The name of the layer; None if the check fails, and then the model is as before.
    """
    layers = layers_of(model)
    part = getattr(layers[-1], "mlp", None) if layers else None
    if not isinstance(part, nn.Module):
        return None
    own = vars(part).get("forward")
    prepared = isinstance(own, partial) and own.func is at_read_positions  # on another device, or before it was copied
    if own is not None and not prepared:
        return None
    device, config = model.device, model.config.get_text_config()
    place = torch.arange(1, 2 * _LENGTH + 1, device=device)
    tokens = place * max(1, config.vocab_size // len(place)) % config.vocab_size  # spread over the vocabulary
    if config.pad_token_id is not None:  # transformers warns of padding without a mask
        tokens = torch.where(tokens == config.pad_token_id, (tokens + 1) % config.vocab_size, tokens)
    wanted = torch.tensor([2, 5, _LENGTH - 1, _LENGTH + 3], device=device)
    read = Pass(tokens.view(2, _LENGTH), wanted)
    unread = torch.ones(2 * _LENGTH, 1, device=device).index_fill(0, wanted, 0.0).view(2, _LENGTH, 1)

    def filled(module: nn.Module, inputs: Any, made: Tensor) -> Tensor:
        return made + (100 * unread).to(made.dtype)

    hook, fits = None, False
    try:
        if not prepared:
            part.forward = partial(at_read_positions, part.forward)
        apart, whole = read.states(model.base_model, skips=True), read.states(model.base_model)
        hook = part.register_forward_hook(filled)
        alone = torch.equal(apart, read.states(model.base_model, skips=True))
        narrow = apart.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
        fits = alone and float(state_errors(apart, whole).max()) <= (_NARROW_ROUNDING if narrow else _ROUNDING)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes or returns something else
        pass
    finally:
        if hook is not None:
            hook.remove()
        if not fits:
            vars(part).pop("forward", None)  # the class has its own
    return next(name for name, module in model.named_modules() if module is layers[-1]) if fits else None
