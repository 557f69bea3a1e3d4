"""Fixtures of the tests on several processes."""

from tests.ranks.pair import pair

__all__ = ["pair"]
