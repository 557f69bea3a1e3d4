"""A Hugging Face causal language model, and the one path by which its log-probabilities are taken."""

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opdlab.errors import UsageError, require
from opdlab.policies.heads import check_head, head_of, output_layer
from opdlab.rollouts.batch import Rollouts
from opdlab.scoring import Head, TokenStatistics, token_statistics

DType = Literal["float32", "bfloat16", "float16"]
_PACKAGE_SCHEME = "package://"


@dataclass(frozen=True)
class Scored:
    """A model's account of rollouts: hidden states of the valid positions, and the head to score them with.

    Args:
        hidden: [N, H], one row per valid response position, in row-major order.
        head: the model's head at the sampling temperature.
        mask: [B, T] bool; ``mask.sum() == N``.
        tokens: [N] long, the sampled tokens.
    """

    hidden: Tensor
    head: Head
    mask: Tensor
    tokens: Tensor

    def statistics(self) -> TokenStatistics:
        """Log-probability (differentiable), entropy and log-normalizer of every valid position, each [N]."""
        return token_statistics(self.hidden, self.head, self.tokens)

    def padded(self, values: Tensor) -> Tensor:
        """[N, …] -> [B, T, …], zeros where the mask is 0; differentiable."""
        return values.new_zeros(*self.mask.shape, *values.shape[1:]).masked_scatter(
            self.mask.view(*self.mask.shape, *[1] * (values.ndim - 1)), values
        )


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        path: a folder, a Hugging Face hub id, or ``package://some.package/folder`` for a model shipped in a package.
        dtype: of the weights.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model. Leave it off unless you trust its author.

    Raises:
        UsageError: the folder is missing or incomplete, the tokenizer has no stop token, or the model's head does
            something that opdlab does not know.

    Example:
        >>> model = LanguageModel("package://opdlab.tasks.toy/models/student")
        >>> model.vocab_size, len(model.tokenizer), model.stop_ids
        (38, 38, [1])
    """

    def __init__(
        self,
        path: str,
        dtype: DType = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = str(path)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model, self.tokenizer = _load(self.path, getattr(torch, dtype), options)
        self.stop_ids = _stop_ids(self.model, self.tokenizer, self.path)
        if self.tokenizer.pad_token_id is None:
            # Padding is always masked, so any token serves; reusing the stop token is the usual choice.
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        self.tokenizer.padding_side = "left"
        check_head(self.model, self.path, len(self.tokenizer))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding rows included."""
        return int(output_layer(self.model).weight.shape[0])

    def head(self, temperature: float = 1.0) -> Head:
        """The model's head, with the scale and soft cap that its architecture applies."""
        return head_of(self.model, temperature)

    def score(self, rollouts: Rollouts) -> Scored:
        """Run the model over prompts and responses and return what scores the responses.

        Args:
            rollouts: on this model's device. Gradients flow unless switched off outside.
        """
        # Every row is moved to column 0, so that padding follows it. Causal attention then needs no mask, which is
        # faster, and lets torch take the kernels that accept none.
        padding = (~rollouts.prompt_mask.bool()).sum(1)
        tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], dim=1)
        last = tokens.shape[1] - 1
        columns = torch.arange(last, device=tokens.device) + padding[:, None]
        hidden = self._hidden_states(tokens.gather(1, columns.clamp(max=last)))
        # One mask look-up for the whole batch; the head then works on valid positions only.
        valid = rollouts.mask.bool()
        row, position = valid.nonzero(as_tuple=True)
        before_response = rollouts.prompt_tokens.shape[1] - padding - 1
        chosen = hidden[row, before_response[row] + position]
        return Scored(chosen, self.head(rollouts.temperature), valid, rollouts.tokens[row, position])

    @torch.no_grad()
    def score_in_chunks(self, rollouts: Rollouts, batch_size: int) -> Iterator[tuple[slice, Scored]]:
        """Score ``batch_size`` rows at a time without gradient, each chunk moved to this model's device.

        Yields:
            The rows of ``rollouts`` that the chunk covers, and the chunk.
        """
        for start in range(0, len(rollouts), batch_size):
            rows = slice(start, min(start + batch_size, len(rollouts)))
            chunk = rollouts.rows(torch.arange(rows.start, rows.stop)).to(self.device)
            yield rows, self.score(chunk)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder."""
        with _Quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _hidden_states(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


def _load(path: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = _resolve(path)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        # Dropout would give student and snapshot different log-probabilities at equal weights.
        for key in [key for key in vars(config) if "drop" in key]:  # resid_pdrop, attention_dropout, layerdrop, …
            if isinstance(getattr(config, key), float):
                setattr(config, key, 0.0)
        with _Quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check that the folder is complete" if Path(source).is_dir() else "check the name and the connection"
        raise UsageError(f"model '{path}' cannot be loaded: {hint} ({first_line})") from error
    missing = sorted(report["missing_keys"])
    require(not missing, f"model '{path}' is incomplete: it lacks {len(missing)} weights, among them {missing[:1]}")
    return model, tokenizer


def _resolve(path: str) -> str:
    if path.startswith(_PACKAGE_SCHEME):
        package, _, folder = path.removeprefix(_PACKAGE_SCHEME).partition("/")
        try:
            shipped = Path(str(importlib.resources.files(package))) / folder
        except ModuleNotFoundError as error:
            raise UsageError(f"model '{path}': there is no package '{package}'") from error
        require(shipped.is_dir(), f"model '{path}': package '{package}' holds no folder '{folder}'")
        return str(shipped)
    local = Path(path).expanduser()
    looks_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or path.endswith("/")
    require(
        local.is_dir() or not looks_local,
        f"model '{path}' does not exist: give a folder written by save_pretrained, or a hub id such as Qwen/Qwen3-0.6B",
    )
    if local.is_dir():
        require(
            (local / "config.json").is_file(),
            f"model '{path}' is incomplete: config.json is missing; write the folder again with save_pretrained",
        )
        # Without them transformers makes up an empty tokenizer of the model's usual kind.
        require(
            any(file for pattern in ("*token*", "vocab*", "*.model") for file in local.glob(pattern)),
            f"model '{path}' is incomplete: the tokenizer's files are missing; save the tokenizer into the folder too",
        )
    return str(local) if local.is_dir() else path


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> list[int]:
    """Union of the tokenizer's and the generation config's stop tokens: base and instruct models differ in one."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    require(bool(ids), f"model '{path}': its tokenizer has no eos_token, so no response could ever end; set one")
    return sorted(ids)


class _Quiet:
    """Silence transformers' bars for loading and saving weights: they would tear our own."""

    def __enter__(self) -> None:
        self._enabled = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            transformers_logging.enable_progress_bar()
