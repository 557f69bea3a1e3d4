"""The built-in gates, one file per family; copy one to write your own."""

if __name__ != "opdlab.strategies":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import opdlab.strategies (two imports of one file make two classes)"
    )

from opdlab.strategies.block import Block32Gate, Block64Gate, Block128Gate, BlockGate
from opdlab.strategies.filter import FilterReweightGate
from opdlab.strategies.prefix import PrefixGate
from opdlab.strategies.ratio import RatioMaskGate, SequenceRatioMaskGate, TruncatedRatioGate
from opdlab.strategies.sequence import NoGate, SequenceGate
from opdlab.strategies.sign import SignConsistencyGate
from opdlab.strategies.span import SpanGate
from opdlab.strategies.token import TokenGate

__all__ = [
    "Block32Gate",
    "Block64Gate",
    "Block128Gate",
    "BlockGate",
    "FilterReweightGate",
    "NoGate",
    "PrefixGate",
    "RatioMaskGate",
    "SequenceGate",
    "SequenceRatioMaskGate",
    "SignConsistencyGate",
    "SpanGate",
    "TokenGate",
    "TruncatedRatioGate",
]
