"""Log-probabilities from hidden states, in bounded memory: the only place where the model's head is applied.

For a response of 16,384 tokens and a vocabulary of 151,936 the logits are 10 GB in float32, so they never exist at
once: positions and vocabulary are worked off in tiles, a few floats per position are kept, and the backward pass
computes a tile's logits again.
"""

from opdlab.scoring.head import Head, LowRank
from opdlab.scoring.logprobs import TokenStatistics, token_logprobs, token_statistics
from opdlab.scoring.support import chosen_logits, support_logits, support_statistics
from opdlab.scoring.topk import TopK, topk_with_statistics

__all__ = [
    "Head",
    "LowRank",
    "TokenStatistics",
    "TopK",
    "chosen_logits",
    "support_logits",
    "support_statistics",
    "token_logprobs",
    "token_statistics",
    "topk_with_statistics",
]
