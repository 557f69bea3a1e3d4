"""Testers for plug-ins: the laws that every gate and every objective obeys, built-in or third-party.

Each takes a function that builds the plug-in, and checks each law on batches with responses that are full, short, with
holes in the mask, of one token, and empty. A new gate or objective needs one line in a test file.
"""

from opdlab.testing.gate_tester import GateTester
from opdlab.testing.objective_tester import ObjectiveTester

__all__ = ["GateTester", "ObjectiveTester"]
