"""Drawing tokens: random numbers that are functions of a stream and a position, and the tokens that they select.

A rollout has a random stream, a 63-bit integer (:func:`opdlab.seeds.derive_streams`). Its token at position t depends
on the stream, on t and on the probabilities there, and on nothing else, so it does not matter which rows are sampled
together, in which order, or in which process.

Shapes: A rows, V vocabulary.
"""

import torch
from torch import Tensor

# The increment and the two multipliers of SplitMix64, as signed 64-bit integers.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
# The largest number. Its product with a sum never rounds up to the sum, so a token beyond it always exists.
_BELOW_ONE = 1 - 2**-53
# Tokens of a block. Vocabularies of more than two blocks are searched in two steps.
BLOCK = 512


def uniforms(streams: Tensor, positions: Tensor) -> Tensor:
    """Return a random number for each stream and position.

    It is the output number ``position`` of SplitMix64 (Steele, Lea and Flood 2014) with the stream as seed: a hash of
    ``stream + (position + 1) * increment``. Its upper 53 bits are the number's.

    Args:
        streams: long.
        positions: long, not negative; of a shape that broadcasts with ``streams``.

    Returns:
        Float64, at least 0 and below 1.

    Example:
        >>> uniforms(torch.tensor([[7], [8]]), torch.arange(2))
        tensor([[0.3898, 0.0168],
                [0.6185, 0.6119]], dtype=torch.float64)
    """
    if streams.device.type == "mps":  # has no double precision
        return uniforms(streams.cpu(), positions.cpu())
    state = torch.add(streams, positions + 1, alpha=_INCREMENT)
    # A shift of signed integers repeats the sign; the masks remove it.
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _FIRST
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _SECOND
    state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2**-53


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return the index that each row's number selects, by inverting the row's cumulative distribution.

    The distribution is cumulated in double precision. A large vocabulary is cumulated over blocks first, and then
    within the block that holds the number, so most of it is read once and only summed: on a CPU this takes a tenth of
    the time of one cumulative sum. No step waits for the device.

    Args:
        probabilities: [A, V], not negative; need not sum to 1.
        numbers: [A] float64, at least 0 and below 1; uniform ones give indices that follow the probabilities.

    Returns:
        [A] long; never an index of probability 0; -1 if a row's probabilities are NaN or infinite.

    Example:
        >>> draw(torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.5]]), torch.tensor([0.4, 0.4]).double())
        tensor([1, 2])
    """
    if probabilities.device.type == "mps":  # has no double precision
        return draw(probabilities.cpu(), numbers.cpu()).to(probabilities.device)
    size, blocks, numbers = probabilities.shape[1], None, numbers[:, None]
    if size > 2 * BLOCK:
        count, rest = divmod(size, BLOCK)
        even = size - rest
        sums = probabilities[:, :even].reshape(-1, count, BLOCK).sum(-1)  # [A, number of blocks]
        sums = torch.cat([sums, probabilities[:, even:].sum(-1, keepdim=True)], 1)
        cumulative = sums.cumsum(-1, dtype=torch.double)
        total = cumulative[:, -1:]
        target = numbers * total
        # Only NaN lies beyond the last block.
        blocks = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[1] - 1)  # [A, 1]
        chosen = sums.gather(1, blocks)
        # Where the target lies in the block, as a share of its sum, which is rounded to single precision.
        inside = (target - cumulative.gather(1, blocks) + chosen) / chosen
        indices = blocks * BLOCK + torch.arange(BLOCK, device=probabilities.device)
        probabilities = probabilities.gather(1, indices.clamp(max=size - 1)).masked_fill(indices >= size, 0.0)
        cumulative = probabilities.cumsum(-1, dtype=torch.double)
        target = inside.clamp(0, _BELOW_ONE) * cumulative[:, -1:]
    else:
        cumulative = probabilities.cumsum(-1, dtype=torch.double)
        total = cumulative[:, -1:]
        target = numbers * total
    drawn = torch.searchsorted(cumulative, target, right=True)
    if blocks is not None:
        drawn = drawn + blocks * BLOCK
    return drawn.masked_fill(~total.isfinite(), -1).squeeze(1)
