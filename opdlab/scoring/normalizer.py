"""Log-sum-exp, entropy and expectations over the vocabulary, from tiles of logits that are seen once.

Shapes: N positions, C columns of the vocabulary, H hidden size.
"""

import torch
from torch import Tensor


class OnlineSoftmax:
    """Sums over the vocabulary for each of N positions, fed tile by tile.

    What was summed is rescaled whenever a larger logit comes: Milakov & Gimelshein, arXiv 1805.02867.

    Args:
        num_rows: N.
        like: gives device and dtype, float32 or wider.
        hidden_size: H, to also sum rows of a matrix by their probability; 0 does not.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> softmax = OnlineSoftmax(1, logits)
        >>> for tile in logits.split(2, dim=1):
        ...     _ = softmax.add(slice(0, 1), tile.clone())
        >>> softmax.log_normalizer, logits.logsumexp(1)
        (tensor([2.4076]), tensor([2.4076]))
    """

    def __init__(self, num_rows: int, like: Tensor, hidden_size: int = 0) -> None:
        # Not -inf, whose differences are not numbers.
        self.max_logit = like.new_full((num_rows,), torch.finfo(like.dtype).min)
        self._sum = like.new_zeros(num_rows)  # of exp(z - max)
        self._moment = like.new_zeros(num_rows)  # of exp(z - max) * (z - max)
        self._rows = like.new_zeros(num_rows, hidden_size)  # of exp(z - max) * a row of the matrix

    def add(self, rows: slice, logits: Tensor) -> Tensor:
        """Take a tile of logits [N', C], which is overwritten, and return ``exp(z - max)`` [N', C]."""
        before = self.max_logit[rows]
        largest = torch.maximum(before, logits.amax(1))
        shift = before - largest
        factor = shift.exp()
        logits -= largest[:, None]
        exponentials = logits.exp()
        # A logit of -inf has probability 0 and must count 0, not 0 * -inf.
        logits.clamp_(min=torch.finfo(logits.dtype).min)
        moment = torch.bmm(exponentials[:, None], logits[:, :, None]).view(-1)
        self._moment[rows] = (self._moment[rows] + shift * self._sum[rows]) * factor + moment
        self._sum[rows] = self._sum[rows] * factor + exponentials.sum(1)
        self._rows[rows] *= factor[:, None]
        self.max_logit[rows] = largest
        return exponentials

    def add_rows(self, rows: slice, summed: Tensor) -> None:
        """Add ``exp(z - max) @ matrix`` [N', H] of the tile that was taken last."""
        self._rows[rows] += summed

    @property
    def log_normalizer(self) -> Tensor:
        """Log-sum-exp of the logits, [N]."""
        return self.max_logit + self._sum.log()

    @property
    def entropy(self) -> Tensor:
        """Of the distribution, nats, [N]."""
        return self._sum.log() - self._moment / self._sum

    @property
    def expected_rows(self) -> Tensor:
        """Mean of the matrix's rows under the distribution, [N, H]."""
        return self._rows / self._sum[:, None]
