"""Shapes of the models in ``gpu.py``, their operations per update, and the peak throughput of GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from common import TOY_MODELS
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opdlab.policies.passes import WORTHWHILE

CARD_BYTES = 80e9  # the paper's A800

# Dense bfloat16 TFLOP/s from the vendors' data sheets; the first name that is part of the device's name applies.
_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_teraflops(name: str) -> float | None:
    """Return the peak of a GPU by its name, or None if it is not known."""
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Shape:
    """Shape of a Qwen3 model, as in its published ``config.json``.

    Args:
        hidden_size: H.
        intermediate_size: of the MLP.
        num_layers: L.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of each.
        vocab_size: V.
        tied: the head is the embedding.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 151_936
    tied: bool = True

    def config(self) -> Qwen3Config:
        """Return the configuration for transformers."""
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=40_960,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )

    @property
    def layer_weights(self) -> int:
        """Return the number of weights of all layers that are multiplied with."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def update_flops(self, prompt: int, response: int, k: int) -> float:
        """Return the floating-point operations of one sequence's forward and backward pass under LSM.

        A product of a weight with a token is two operations forward and four backward. The last layer's feed-forward
        part leaves out the prompt, if that is a tenth of the tokens at least. Causal attention multiplies half of
        tokens x tokens, twice. In the head each response token uses all of the vocabulary forward, and K rows back.

        Args:
            prompt: tokens.
            response: tokens; the last one is predicted, but not an input.
            k: K.
        """
        tokens = prompt + response - 1
        left_out = tokens - response if response <= WORTHWHILE * tokens else 0
        layers = 6.0 * (self.layer_weights * tokens - 3 * self.hidden_size * self.intermediate_size * left_out)
        attention = 3 * self.num_layers * 2.0 * tokens**2 * self.num_heads * self.head_dim
        head = 2.0 * response * self.hidden_size * (self.vocab_size + 2 * k)
        return layers + attention + head

    def save(self, folder: Path, dtype: torch.dtype, device: torch.device) -> str:
        """Save a model with random weights, made on the device for speed, and a tokenizer."""
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3ForCausalLM._from_config(self.config(), dtype=dtype)
        model.save_pretrained(folder)
        # Any tokenizer with stop token id 1 works, because the text is not used.
        AutoTokenizer.from_pretrained(TOY_MODELS / "student").save_pretrained(folder)
        return str(folder)


@dataclass(frozen=True)
class Plan:
    """Models and sizes to measure.

    Args:
        students: by name.
        teacher: of all students.
        lengths: response tokens.
        prompt: tokens before them.
        k: size of the support.
        sampled: number of sampled responses, and tokens of each.
        kernel_positions: positions of scoring alone.
        kernel_hidden: H of scoring alone.
        engine: student of vLLM; it has a head_dim of 32 at least, as vLLM's kernels need.
        engine_sampled: number of responses of vLLM, and tokens of each.
        packed: tokens of the responses of a micro-batch that is packed.
        sharded_lengths: response tokens under FSDP2.
    """

    students: Mapping[str, Shape]
    teacher: Shape
    lengths: tuple[int, ...]
    prompt: int
    k: int
    sampled: tuple[int, int]
    kernel_positions: tuple[int, ...]
    kernel_hidden: int
    engine: Shape
    engine_sampled: tuple[int, int]
    packed: tuple[int, ...]
    sharded_lengths: tuple[int, ...]


QWEN3 = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128),
    "4B": Shape(2560, 9728, 36, 32, 8, 128),
    "8B": Shape(4096, 12_288, 36, 32, 8, 128, tied=False),
    "32B": Shape(5120, 25_600, 64, 64, 8, 128, tied=False),
}
REAL = Plan(
    students={f"Qwen3-{size}": QWEN3[size] for size in ("0.6B", "1.7B")},
    teacher=QWEN3["4B"],
    lengths=(2048, 4096, 8192, 16_384),
    prompt=256,
    k=32,
    sampled=(16, 256),
    kernel_positions=(2048, 16_384),
    kernel_hidden=2048,
    engine=QWEN3["1.7B"],
    engine_sampled=(128, 512),
    packed=(4096, 2048, 1024, 512, 512, 256, 256, 128),
    sharded_lengths=(2048, 16_384),
)
SMOKE = Plan(
    students={"Qwen3-0.6B": Shape(32, 64, 2, 4, 2, 8, 128), "Qwen3-1.7B": Shape(48, 96, 2, 4, 2, 8, 128)},
    teacher=Shape(64, 96, 2, 4, 2, 16, 128),
    lengths=(16, 32),
    prompt=4,
    k=8,
    sampled=(2, 4),
    kernel_positions=(16,),
    kernel_hidden=32,
    engine=Shape(64, 128, 2, 2, 1, 32, 128),
    engine_sampled=(2, 4),
    packed=(16, 8, 3),
    sharded_lengths=(16,),
)
