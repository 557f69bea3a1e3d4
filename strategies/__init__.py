"""The built-in gates, one file per family; copy one to write your own."""

if __name__ != "opdlab.strategies":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import opdlab.strategies (two imports of one file make two classes)"
    )

from opdlab.strategies.block import Block32Gate, Block64Gate, Block128Gate, BlockGate
from opdlab.strategies.filter import FilterReweightGate
from opdlab.strategies.freshness import FreshnessGate
from opdlab.strategies.horizon import HorizonGate
from opdlab.strategies.prefix import PrefixGate
from opdlab.strategies.ratio import RatioMaskGate, SequenceRatioMaskGate, TruncatedRatioGate
from opdlab.strategies.reward import RewardGate
from opdlab.strategies.selection import EntropyTopGate, TeachabilityGate, TokenImportanceGate, TopShareGate
from opdlab.strategies.sequence import NoGate, SequenceGate
from opdlab.strategies.sign import SignConsistencyGate
from opdlab.strategies.span import SpanGate
from opdlab.strategies.token import TokenGate

__all__ = [
    "Block32Gate",
    "Block64Gate",
    "Block128Gate",
    "BlockGate",
    "EntropyTopGate",
    "FilterReweightGate",
    "FreshnessGate",
    "HorizonGate",
    "NoGate",
    "PrefixGate",
    "RatioMaskGate",
    "RewardGate",
    "SequenceGate",
    "SequenceRatioMaskGate",
    "SignConsistencyGate",
    "SpanGate",
    "TeachabilityGate",
    "TokenGate",
    "TokenImportanceGate",
    "TopShareGate",
    "TruncatedRatioGate",
]
