"""The pair of processes, for all tests of this folder."""

from tests.ranks.pair import pair

__all__ = ["pair"]
