"""Weights for an engine: merged, under the names of a checkpoint, with the output layer in any case."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opdlab.errors import require
from opdlab.policies.language_model import LanguageModel

_HEAD_FILE = "model-head.safetensors"  # replaced by LanguageModel.save, as all files named so
_INDEX = "model.safetensors.index.json"


def check_merging(*, adapter: bool, sharded: bool) -> None:
    """Raise a UsageError if an adapter cannot be merged for an engine.

    Args:
        adapter: the student has one.
        sharded: the strategy shards the weights over the processes; such a model cannot be copied.
    """
    require(
        not (adapter and sharded),
        "model.sampler is vLLM, which takes the adapter of model.student merged into a copy of the weights, but "
        "trainer.strategy model_parallel shards them over processes: set model.sampler to transformers, or take the "
        "strategy ddp",
    )


def plain_model(model: LanguageModel) -> LanguageModel:
    """Return the model that an engine loads: without an adapter, which is merged into a copy of the weights.

    Args:
        model: sharded weights are gathered, see :meth:`opdlab.policies.Sampler.refresh`.

    Raises:
        UsageError: it has an adapter and is sharded.
    """
    check_merging(adapter=model.has_adapter, sharded=model.sharding is not None)
    return model.without_adapter(merge=True) if model.has_adapter else model


@torch.no_grad()
def named_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each weight, the output layer's also if it is the embedding's.

    An engine that gets no weight of the output layer may keep the old one and report success.

    Args:
        model: without an adapter.

    Example:
        >>> model = LanguageModel("package://opdlab.toy/models/student")
        >>> model.model.config.tie_word_embeddings, "lm_head.weight" in dict(named_weights(model))
        (True, True)
    """
    for name, tensor in model.model.state_dict().items():
        yield name, tensor.detach()


def write_weights(model: LanguageModel, folder: Path) -> bool:
    """Write a model as a folder of Hugging Face's format, the output layer also if it is the embedding.

    Args:
        model: without an adapter.
        folder: output folder; a kill leaves an earlier model as it was, or one that lacks the output layer.

    Returns:
        True if the names in the files are those of :func:`named_weights`; transformers renames some models' weights.
    """
    model.save(folder)
    files = {path: _keys(path) for path in folder.glob("*.safetensors")}
    names, own = set().union(*files.values()), dict(named_weights(model))
    output = model.model.get_output_embeddings()
    head = next(f"{name}.weight" for name, module in model.model.named_modules() if module is output)
    if head not in names:
        save_file({head: own[head].cpu().contiguous()}, folder / _HEAD_FILE, metadata={"format": "pt"})
        if (index := folder / _INDEX).is_file():  # engines skip files that it does not name
            content = json.loads(index.read_text())
            content["weight_map"][head] = _HEAD_FILE
            index.write_text(json.dumps(content))
    return names <= own.keys()


def _keys(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())
