"""What a run must know of all its prompts, found in one pass over them."""

from collections.abc import Iterator

from opdlab.records import ListDigest
from opdlab.types import Problem, Prompt


class PromptFacts:
    """Facts of prompts that are looked at one by one, and not held.

    Example:
        >>> facts = PromptFacts()
        >>> facts.look(Prompt(0, Problem("a", "1 + 1", "2"), (5, 9, 5)))
        >>> facts.look(Prompt(1, Problem("b", "1 + 7", "8"), (5, 12), teacher_tokens=(3,)))
        >>> [found and (found[0], found[1].id) for found in map(facts.first_with_token, (9, 10, 13))]
        [(9, 'a'), (12, 'b'), None]
        >>> [problem.id for problem in facts.lack_demonstration], facts.teachers_see_others
        (['a'], True)
        >>> facts.longest, facts.longest_of_teacher()
        (3, 3)
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of prompts."""
        self.lack_demonstration: list[Problem] = []
        """The first problem without a given response; empty if all have one."""
        self.teachers_see_others = False
        """True if the teacher sees another prompt than the student for some problem."""
        self.longest = 0
        """Tokens of the longest prompt."""
        self._rows, self._teacher_tokens, self._demonstrations = ListDigest(), ListDigest(), ListDigest()
        self._largest: list[tuple[int, Problem]] = []  # each token is larger than all before
        self._of_teacher: dict[str | None, Problem] = {}
        self._longest_of_teacher: dict[str | None, int] = {}

    def look(self, prompt: Prompt) -> None:
        """Look at the next prompt."""
        problem = prompt.problem
        self._rows.add((problem.id, prompt.tokens, problem.answer))
        self._teacher_tokens.add(prompt.teacher_tokens)
        self._demonstrations.add(prompt.demonstration)
        self.teachers_see_others |= prompt.teacher_tokens is not None
        if prompt.demonstration is None and not self.lack_demonstration:
            self.lack_demonstration.append(problem)
        self.longest = max(self.longest, len(prompt.tokens))
        seen = len(prompt.teacher_tokens or prompt.tokens)
        self._longest_of_teacher[problem.teacher] = max(self._longest_of_teacher.get(problem.teacher, 0), seen)
        token = max((*prompt.tokens, *(prompt.teacher_tokens or ()), *(prompt.demonstration or ())))
        if not self._largest or token > self._largest[-1][0]:
            self._largest.append((token, problem))
        self._of_teacher.setdefault(problem.teacher, problem)
        self.count += 1

    def first_with_token(self, least: int) -> tuple[int, Problem] | None:
        """Return the largest token of the first prompt with a token id of at least ``least``, and its problem."""
        return next((each for each in self._largest if each[0] >= least), None)

    def longest_of_teacher(self, name: str = "") -> int:
        """Return the tokens of the longest prompt that a teacher sees; 0 if it sees none.

        Args:
            name: of the teacher; empty if there is one for all problems.
        """
        return max(self._longest_of_teacher.values(), default=0) if not name else self._longest_of_teacher.get(name, 0)

    def first_of_teachers(self) -> Iterator[Problem]:
        """Yield the first problem that names each teacher, and the first that names none."""
        yield from self._of_teacher.values()

    @property
    def digest(self) -> str:
        """Return the digest of ids, prompt tokens and gold answers."""
        return self._rows.hexdigest()

    @property
    def teacher_digest(self) -> str:
        """Return the digest of the tokens that the teacher sees in place of the student's."""
        return self._teacher_tokens.hexdigest()

    @property
    def demonstrations_digest(self) -> str:
        """Return the digest of the tokens of the given responses."""
        return self._demonstrations.hexdigest()
