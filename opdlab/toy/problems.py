"""Source of problems of the toy world."""

import itertools

from opdlab.data.prompts import ProblemSource
from opdlab.errors import require
from opdlab.toy.chain import Split, chain_problems
from opdlab.types import Problem
from opdlab.verifiers.verifier import BoxedVerifier


class ChainProblems(ProblemSource):
    """Chains of modular arithmetic; see :mod:`opdlab.toy.chain`.

    Args:
        num_problems: number of problems.
        split: ``train`` or ``held_out``; disjoint from each other and from the training data of the shipped models.
        seed: selects the stream of problems.
    """

    def __init__(self, num_problems: int = 2048, split: Split = "train", seed: int = 0) -> None:
        super().__init__(verifier=BoxedVerifier(at_end=True))
        require(num_problems >= 1, f"num_problems is {num_problems}, but must be at least 1")
        self.num_problems = num_problems
        self.split: Split = split
        self.seed = seed
        self._problems: list[Problem] | None = None

    @property
    def name(self) -> str:
        """Return the name with the split."""
        return f"toy chains ({self.split})"

    def problems(self) -> list[Problem]:
        """See :meth:`ProblemSource.problems`."""
        if self._problems is None:
            chains = itertools.islice(chain_problems(self.split, self.seed), self.num_problems)
            name = f"{self.split}-{self.seed}"
            self._problems = [Problem(f"{name}-{i}", chain.prompt, chain.answer) for i, chain in enumerate(chains)]
        return self._problems
