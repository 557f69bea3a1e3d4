"""Log-probabilities from hidden states, in bounded memory. Only this package applies the model's head.

For a response of 16,384 tokens and a vocabulary of 151,936 the logits take 10 GB in float32. They never exist all at
once: positions and vocabulary are processed in tiles, a few floats per position are kept, and the backward pass
recomputes the logits of each tile.
"""

from opdlab.scoring.full_divergence import divergence_statistics
from opdlab.scoring.head import Head, LowRank
from opdlab.scoring.logprobs import TokenStatistics, TopK, token_logprobs, token_statistics, topk_with_statistics
from opdlab.scoring.support import support_logits, support_overlap, support_statistics
from opdlab.scoring.tail import SupportTail, support_tail, topk_with_tail

__all__ = [
    "Head",
    "LowRank",
    "SupportTail",
    "TokenStatistics",
    "TopK",
    "divergence_statistics",
    "support_logits",
    "support_overlap",
    "support_statistics",
    "support_tail",
    "token_logprobs",
    "token_statistics",
    "topk_with_statistics",
    "topk_with_tail",
]
