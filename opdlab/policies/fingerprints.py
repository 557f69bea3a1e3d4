"""Digests that tell one model from another."""

import hashlib

import torch
from torch import nn

from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sharding import whole
from opdlab.records import digest

_DIGEST_BYTES = 16
# Keys of a Hugging Face configuration that name a model's origin and do not affect what it computes.
_ORIGIN_KEYS = ("_name_or_path", "transformers_version", "_commit_hash", "name_or_path")
_SAMPLES = 64  # values of each parameter that tell one model from another


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Return a digest of everything that determines a model's samples: weights, architecture and stop tokens.

    Takes about a second per GB of weights. The digest does not depend on the path of the weights.

    Args:
        model: on any device; all processes that share its weights call this together.

    Example:
        >>> model = LanguageModel("package://opdlab.toy/models/student")
        >>> before = fingerprint(model)
        >>> model.model.model.norm.weight.data[0] += 1e-6
        >>> before == fingerprint(model)
        False
    """
    config = {key: value for key, value in model.model.config.to_dict().items() if key not in _ORIGIN_KEYS}
    # An adapter's scaling factor is neither a weight nor part of the model's configuration.
    scaling = [(name, getattr(layer, "scaling", None)) for name, layer in model.model.named_modules()]
    factors = [(name, value) for name, value in scaling if isinstance(value, dict)]
    total = hashlib.blake2b(digest([config, model.stop_ids, factors]).encode(), digest_size=_DIGEST_BYTES)
    # named_parameters() lists tied weights once.
    for name, tensor in sorted([*model.model.named_parameters(), *model.model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        own = whole(tensor.detach())
        # FSDP2 could not free memory that numpy has seen.
        raw = (own if model.sharding is None else own.clone()).cpu().contiguous().view(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module, frozen: bool = False) -> str:
    """Return a digest of a few values of each weight, by which another model differs.

    No weight is read whole, but sharded ones are gathered: all processes that share them call this together.
    """
    lines = []
    for name, weight in sorted(model.named_parameters()):
        if frozen and weight.requires_grad:
            continue
        flat = whole(weight.detach()).reshape(-1)
        few = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].cpu().double()
        lines.append([name, list(weight.shape), few.tolist()])
    return digest(lines)[:8]
