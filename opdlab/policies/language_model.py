"""A Hugging Face causal language model, and the single code path that computes its log-probabilities."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import require
from opdlab.files import replacing_files
from opdlab.packages import require_package
from opdlab.policies.adapters import (
    AdapterConfig,
    attach_adapter,
    base_of,
    keep_adapter_only,
    load_adapter,
    low_rank_of,
    put_back_frozen,
    save_adapter,
    take_off_adapter,
    whole_model,
)
from opdlab.policies.compiling import compile_layers, layers_of, require_compiler
from opdlab.policies.context import context_length
from opdlab.policies.heads import check_head, check_weights
from opdlab.policies.last_layer import prepare
from opdlab.policies.loading import (
    DType,
    ModelSource,
    Quantization,
    adapter_base,
    checkpoint_gradients,
    has_tokenizer,
    quiet_bars,
    resolve,
    save_network,
    stop_tokens_of,
)
from opdlab.policies.packing import attention_may_pack, keeps_packed_rows_apart
from opdlab.policies.passes import PASS_OVERHEAD, PackedRows, length_groups, length_packs
from opdlab.policies.sharding import Sharding, whole_state
from opdlab.policies.tokenizers import vocabulary_size
from opdlab.scoring import (
    Head,
    SupportTail,
    TokenStatistics,
    divergence_statistics,
    support_statistics,
    support_tail,
    token_statistics,
)
from opdlab.types import Rollouts, Targets


@dataclass(frozen=True)
class Scored:
    """A model's hidden states at the valid positions of rollouts, and the head that computes log-probabilities.

    Each pass over the head runs once and its results are cached.

    Args:
        hidden: [N, H], one row per valid response position, in row-major order.
        head: the model's head at the sampling temperature.
        mask: [B, T] bool; ``mask.sum() == N``.
        tokens: [N] long, the sampled tokens.
        places: [N] long, indices into [B * T] of the valid positions.
    """

    hidden: Tensor
    head: Head
    mask: Tensor
    tokens: Tensor
    places: Tensor
    # By the kind of pass, and the tensor of the support's ids or of the teacher's hidden states, which is compared by
    # identity, with the options of a divergence.
    _passes: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, hidden: Tensor, head: Head, mask: Tensor, tokens: Tensor) -> "Scored":
        """Return the scores with the places that the mask says; for these the host waits for the device."""
        return cls(hidden, head, mask, tokens, mask.flatten().nonzero().squeeze(1))

    def statistics(self) -> TokenStatistics:
        """Return log-probability (differentiable), entropy and log-normalizer of every valid position, each [N]."""
        if "tokens" not in self._passes:
            self._passes["tokens"] = token_statistics(self.hidden, self.head, self.tokens)
        statistics: TokenStatistics = self._passes["tokens"]
        return statistics

    def support_statistics(self, support_ids: Tensor) -> tuple[Tensor, TokenStatistics]:
        """Return the logits of a support (differentiable), and :meth:`statistics` without gradient, in one pass.

        Args:
            support_ids: [B, T, K] integers, such as :attr:`opdlab.types.Targets.support_ids`.

        Returns:
            Logits [N, K] and statistics, each [N].
        """
        key = "support", support_ids
        if key not in self._passes:
            chosen = self.picked(support_ids.long())
            self._passes[key] = support_statistics(self.hidden, self.head, self.tokens, chosen)
        found: tuple[Tensor, TokenStatistics] = self._passes[key]
        return found

    def support_tail(self, support_ids: Tensor) -> SupportTail:
        """Return the logits of a support and the log-sum of all others, with the log-normalizer, in one pass.

        These three and the log-probabilities are differentiable; the gradient reaches every token.

        Args:
            support_ids: [B, T, K] integers; an id that stands there twice is counted once.
        """
        key = "tail", support_ids
        if key not in self._passes:
            chosen = self.picked(support_ids.long())
            self._passes[key] = support_tail(self.hidden, self.head, self.tokens, chosen)
        found: SupportTail = self._passes[key]
        return found

    def divergence_statistics(
        self, teacher_hidden: Tensor, teacher_head: Head, divergence: str, beta: float, alpha: float
    ) -> tuple[Tensor, TokenStatistics]:
        """Return the divergence over the whole vocabulary (differentiable), and the statistics without, in one pass.

        Args:
            teacher_hidden: [B, T, G], such as :attr:`opdlab.types.Targets.hidden`.
            teacher_head: computes the teacher's logits from them.
            divergence: see :func:`opdlab.scoring.divergence_statistics`.
            beta: see there.
            alpha: see there.

        Returns:
            The divergence [N] and the statistics, each [N].
        """
        key = (teacher_hidden, teacher_head.temperature, divergence, beta, alpha)
        if key not in self._passes:
            sides = self.hidden, self.head, self.picked(teacher_hidden), teacher_head
            self._passes[key] = divergence_statistics(
                *sides, self.tokens, divergence=divergence, beta=beta, alpha=alpha
            )
        found: tuple[Tensor, TokenStatistics] = self._passes[key]
        return found

    def own_logprobs(self, targets: Targets) -> Tensor:
        """Return the model's log-probabilities of the sampled tokens, [B, T] nats, detached.

        Args:
            targets: if they have a support, the log-probabilities come from the pass that computes its logits, and
                its tail if they have that.
        """
        ids = targets.support_ids
        if ids is None:
            statistics = self.statistics()
        elif targets.log_tail is None:
            statistics = self.support_statistics(ids)[1]
        else:
            statistics = self.support_tail(ids).statistics
        return self.padded(statistics.logprobs.detach())

    def picked(self, values: Tensor) -> Tensor:
        """Return the values of the valid positions, [B, T, …] -> [N, …]; differentiable."""
        if values.shape[:2] != self.mask.shape:
            raise IndexError(f"values of shape {list(values.shape)} for positions {list(self.mask.shape)}")
        return values.flatten(0, 1).index_select(0, self.places)

    def padded(self, values: Tensor) -> Tensor:
        """Return values at their positions, [N, …] -> [B, T, …], 0 at masked positions; differentiable."""
        shape = *self.mask.shape, *values.shape[1:]
        return values.new_zeros(self.mask.numel(), *values.shape[1:]).index_copy(0, self.places, values).view(shape)


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        path: a folder, a Hugging Face hub id, or ``package://some.package/folder`` for a model shipped in a package. A
            folder may also hold only an adapter, as :meth:`save` writes it; its base is then loaded too.
        dtype: of the weights.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model. Leave it off unless you trust its author.
        attn_implementation: transformers' attention kernel: ``sdpa`` (its default), ``eager``, ``flash_attention_2``, …
            Where ``sdpa`` would run on a CPU in float32, opdlab computes short rows itself, which takes less time.
            With flash attention and ``flex_attention``, rows are packed end to end without padding for scoring, if
            the model keeps them apart; otherwise rows of similar length are padded together.
        gradient_checkpointing: recompute each layer's activations in the backward pass instead of keeping them:
            less memory, about a third more time for a training step. If ``max_tokens_per_pass`` also recomputes
            whole passes, these run forward three times instead of once: two thirds more time, and only the layers'
            inputs of one such pass are in memory. Sampling is not affected.
        gguf_file: name of a GGUF file in ``path``, which is unpacked to ``dtype``. Needs the extra ``gguf``.
        adapter: train a low-rank adapter on frozen weights. Needs the extra ``peft``.
        quantization: keep the weights in ``4bit`` (NF4) or ``8bit``: for models that are not trained, on a GPU. Needs
            the extra ``bitsandbytes``.
        compile: compile the layers with torch.compile for scoring, not for sampling: adds about half a minute to the
            first steps and makes each step faster. Needs a C++ compiler.
        stop_tokens: texts of the tokens that end a response, each a single token. Null takes those of the tokenizer and
            of the generation config.

    Attributes:
        vocab_size: number of tokens: rows of the embedding that are tokens of the tokenizer, and that the teacher has
            too (:func:`opdlab.policies.share_vocabulary`). Only ids below it are sampled, and distributions are over
            these; other rows only pad the embedding.
        group_lengths: True (the default) to score rows of similar length in one padded pass. Sharded weights are always
            scored in one pass, because processes would form different numbers of groups.
        max_tokens: tokens per pass whose activations are kept, padding included; None (the default) for no bound, as
            sharded weights need it.
        sharding: the weights' division over the processes of a run; None (the default) if this process has them all.
        accumulate_head_grad: see :class:`opdlab.scoring.Head`; False by default. Set it to True only if nothing hooks
            into the head's gradient.

    Raises:
        UsageError: the folder is missing or incomplete, a package or a compiler is missing, the tokenizer has no
            stop token, a stop, padding or BOS token has no row, weights are NaN or infinite, or opdlab does not support
            the model's head.

    Example:
        >>> model = LanguageModel("package://opdlab.toy/models/student")
        >>> model.vocab_size, len(model.tokenizer), model.stop_ids
        (38, 38, [1])
    """

    def __init__(
        self,
        path: str,
        dtype: DType = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        gguf_file: str | None = None,
        adapter: AdapterConfig | None = None,
        quantization: Quantization | None = None,
        compile: bool = False,
        stop_tokens: list[str] | None = None,
    ) -> None:
        super().__init__()
        if compile:
            require_compiler(str(path))
        self.path, self.quantization = str(path), quantization
        source = ModelSource(
            self.path, dtype, revision, trust_remote_code, attn_implementation, gguf_file, quantization
        )
        self.model, self.tokenizer = self._load(source, adapter)
        # Names of the frozen weights below an adapter: the snapshot shares them and checkpoints omit them.
        named = self.named_parameters(remove_duplicate=False) if self.has_adapter else ()
        self.frozen_keys = frozenset(name for name, parameter in named if not parameter.requires_grad)
        self.group_lengths = True
        self.max_tokens: int | None = None
        self.sharding: Sharding | None = None
        self.accumulate_head_grad = False
        # For a device and an attention kernel: see `_check`.
        self._checked: tuple[tuple[torch.device, str], bool, str | None] | None = None
        self._compile = compile
        self.register_state_dict_post_hook(keep_adapter_only)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(put_back_frozen)  # type: ignore[no-untyped-call]
        self.context = context_length(self.model)
        self.stop_tokens = stop_tokens_of(self.model, self.tokenizer, self.path, stop_tokens)
        self.stop_ids = sorted(self.stop_tokens.ids)
        num_rows = check_weights(self.model, self.path)
        self.vocab_size = vocabulary_size(self.tokenizer, self.stop_ids, num_rows, f"model '{self.path}'")
        if self.tokenizer.pad_token_id is None:
            # Padding is always masked, so any token works; the stop token is the usual choice.
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        self.tokenizer.padding_side = "left"
        check_head(self.model, self.head(), self.path, self.vocab_size)
        if gradient_checkpointing:
            checkpoint_gradients(self.model, self.path)

    def _load(
        self, source: ModelSource, adapter: AdapterConfig | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        base = adapter_base(self.path)
        if base is not None or adapter is not None:  # fail before reading the weights, which may be slow
            require_package("peft", "model.student.adapter" if base is None else f"model '{self.path}'", "peft")
        source = replace(source, path=base or self.path)
        model, tokenizer = source.load()
        resolved = resolve(source.path, with_config=False)
        origin = str(Path(resolved).absolute()) if Path(resolved).is_dir() else resolved
        if base is not None:
            require(
                adapter is None, f"model '{self.path}' is an adapter already: leave adapter out to train it further"
            )
            folder = Path(self.path).expanduser()
            load_adapter(model, folder, origin)
            tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer(folder) else tokenizer
        elif adapter is not None:
            attach_adapter(model, adapter, origin)
        return model, tokenizer

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained and the weights below it are frozen."""
        return bool(getattr(self.model, "_hf_peft_config_loaded", False))

    def snapshot(self) -> "LanguageModel":
        """Return a frozen copy in eval mode; it shares the weights below an adapter, which never change."""
        require(
            self.quantization is None,
            f"model.student has quantization '{self.quantization}', but packed weights cannot be trained: leave it "
            "out; the teacher may have it",
        )
        return copy.deepcopy(self, self._shared()).requires_grad_(False).eval()

    def without_adapter(self, merge: bool = False) -> "LanguageModel":
        """Return a frozen model without the adapter, in eval mode.

        Args:
            merge: add the adapter to a copy of the weights; otherwise drop the adapter and share the weights.
        """
        plain = copy.deepcopy(self, {} if merge else self._shared())
        take_off_adapter(plain.model, merge)
        plain.frozen_keys, plain._compile = frozenset(), False
        return plain.requires_grad_(False).eval()

    def _shared(self) -> dict[int, Any]:
        """Return the memo for ``deepcopy`` that makes copies share the frozen weights."""
        named = self.named_parameters(remove_duplicate=False)
        return {id(parameter): parameter for name, parameter in named if name in self.frozen_keys}

    @property
    def compiles(self) -> bool:
        """True if the layers are compiled for scoring."""
        return self._compile

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def shard(self, mesh: Any) -> None:
        """Shard the weights over all processes, which call this together; done once, and the weights move to the mesh.

        Copies of the model must be made before.

        Args:
            mesh: see :class:`opdlab.policies.sharding.Sharding`.

        Raises:
            UsageError: the weights are packed, or the layers are compiled.
        """
        if self.sharding is not None:
            return
        for value, said in ((self.quantization, "quantization"), (self._compile, "compile")):
            require(
                not value,
                f"model '{self.path}' has {said} {str(value).lower()}, which does not go with weights that are sharded "
                "over processes: leave it out, or take trainer.strategy ddp",
            )
        self.sharding = Sharding(self, layers_of(self.model), mesh)

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which each process has all weights, see :meth:`Sharding.whole`."""
        return nullcontext() if self.sharding is None else self.sharding.whole()

    def whole_weights(self, *, keep: bool) -> dict[str, Tensor] | None:
        """Return sharded weights for :meth:`save`, in host memory; None if the weights are not sharded.

        Args:
            keep: False in a process that only takes part.
        """
        return None if self.sharding is None else whole_state(self.model, keep=keep)

    def forward(self, **inputs: Any) -> Any:
        """Return the output of the model below the head; passes of sharded weights come through here."""
        return self.model.base_model(**inputs)

    def head(self, temperature: float = 1.0) -> Head:
        """Return the model's head, with the scale and soft cap of its architecture and the adapter's update."""
        config = self.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        layer, low_rank = self.model.get_output_embeddings(), None
        if hasattr(layer, "get_base_layer"):  # it has an adapter
            layer, low_rank = base_of(layer), low_rank_of(layer)
        bias, vocab_size = getattr(layer, "bias", None), self.vocab_size
        return Head(layer.weight, bias, scale, softcap, temperature, low_rank=low_rank, vocab_size=vocab_size)

    def score(self, rollouts: Rollouts) -> Scored:
        """Return the scores of the responses from a pass over prompts and responses.

        Args:
            rollouts: on this model's device. Gradients flow unless the caller disables them.
        """
        if self._compile:
            compile_layers(self.model)
        place = (next(self.model.parameters()).device, self.model.config._attn_implementation)
        if self._checked is None or self._checked[0] != place:
            self._checked = place, *self._check()
        _, packed, last = self._checked
        rows = PackedRows(rollouts)
        if packed:
            groups = length_packs(rows.lengths, self.max_tokens)
        elif self.group_lengths and (self.sharding is None or self.sharding.is_whole):
            overhead = PASS_OVERHEAD["cpu" if rollouts.tokens.is_cpu else "gpu"]
            groups = length_groups(rows.lengths, overhead, self.max_tokens)
        else:
            groups = [list(range(len(rollouts)))]
        if not groups:  # no valid position; run one pass anyway, as other processes do
            groups, packed = [list(range(len(rollouts)))], False
        model = self.model.base_model if self.sharding is None else self
        again = False
        if torch.is_grad_enabled():
            # The backward pass computes checkpointed layers again by itself, without knowing what a pass chose.
            layer = self.model if last is None else self.model.get_submodule(last)
            again = layer.training and (last is None or layer.gradient_checkpointing)
        skips = last is not None and self.sharding is None and not again
        hidden = rows.states(model, groups, packed, self.max_tokens, skips=skips, own=not self._compile and not again)
        head = replace(self.head(rollouts.temperature), accumulate_grad=self.accumulate_head_grad)
        tokens = rollouts.tokens.flatten().index_select(0, rows.places)
        return Scored(hidden, head, rollouts.mask.bool(), tokens, rows.places)

    def _check(self) -> tuple[bool, str | None]:
        """Return whether rows can be packed end to end, and the last layer, if its passes may skip positions."""
        may_pack = attention_may_pack(self.model)
        with self.whole() if may_pack else nullcontext():
            packs = may_pack and keeps_packed_rows_apart(self.model)
        # Hooks of sharded weights and compiled code take the layers as they are.
        return packs, None if self.sharding is not None or self._compile else prepare(self.model)

    @torch.no_grad()
    def score_in_chunks(self, rollouts: Rollouts, batch_size: int) -> Iterator[tuple[Tensor, Scored]]:
        """Yield the scores of ``batch_size`` rows of similar length at a time, without gradient, on the model's device.

        Yields:
            The indices of the chunk's rows in ``rollouts``, longest first, and its scores; no chunk without rows.
        """
        lengths = rollouts.prompt_mask.sum(1) + rollouts.mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        chunks = torch.split(order, batch_size) if len(order) else ()  # it would split no rows into an empty chunk
        in_step = self.sharding if self.sharding is not None and not self.sharding.is_whole else None
        agreed = len(chunks) if in_step is None else in_step.agree(len(chunks))
        for rows in chunks:
            yield rows, self.score(rollouts.rows(rows).to(self.device))
        if in_step is not None:
            in_step.finish_passes(len(chunks), agreed)

    def responses(self, rollouts: Rollouts) -> list[str]:
        """Return the text of each response, without special tokens."""
        rows = zip(rollouts.tokens.tolist(), rollouts.num_tokens.tolist(), strict=True)
        texts: list[str] = self.tokenizer.batch_decode([r[:n] for r, n in rows], skip_special_tokens=True)
        return texts

    def save(self, folder: Path, merge: bool = False, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write model and tokenizer as a Hugging Face folder.

        A kill leaves an earlier one as it was, or one without a configuration, which does not load.

        Args:
            folder: output folder.
            merge: if True, merge an adapter and write the whole model; if False, write only the adapter, in peft's
                format with the path of its base. Without an adapter, the whole model is always written.
            weights: of :meth:`whole_weights`, which all processes call before; one of them saves.

        Raises:
            UsageError: the weights were loaded from this folder.
            FullDiskError: the disk is full.
        """
        self.check_not_origin(folder)
        # Files from an earlier save would be loaded instead of these, or in addition.
        other_kind = "config.json" if self.has_adapter and not merge else "adapter_*"
        stale = (other_kind, "model*.safetensors*", "generation_config.json")
        needed = ("config.json", "adapter_config.json", "*.index.json")
        with replacing_files(Path(folder), stale, needed) as new, quiet_bars():
            if self.has_adapter and not merge:
                save_adapter(self.model, new, weights)
            elif weights is not None:
                save_network(whole_model(self.model, weights, merge=True), new)
            else:
                save_network((self.without_adapter(merge=True) if self.has_adapter else self).model, new)
            self.tokenizer.save_pretrained(new)

    def check_not_origin(self, folder: Path) -> None:
        """Raise a UsageError if the weights were loaded from this folder, see :meth:`save`."""
        origins = [path for path in (self.path, adapter_base(self.path)) if path is not None]
        require(
            all(Path(folder).resolve() != Path(path).expanduser().resolve() for path in origins),
            f"export.folder is '{folder}', where the student's weights come from: give another folder",
        )
