"""What is evaluated."""

from dataclasses import dataclass

from opdlab.errors import require
from opdlab.policies.sampler import SamplingConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, apart from how answers are sampled.

    Args:
        pass_at: values of k; each must be at most ``eval_sampling.num_samples``.
        reverse_kl: also estimate the reverse KL to the teacher per token, ``mean(logpi - logq)`` over the fresh
            samples; costs a pass of student and teacher over them. Unbiased at ``top_p`` 1.
        teacher: evaluate the teacher too, once, when training ends.
        seed: decides what is sampled, so that evaluations differ by their weights alone.
        samples: folder into which every sample is written as it comes, and from which an evaluation that was killed
            goes on; ``{settings}`` in it stands for a digest of weights and settings. None writes nothing, except
            that ``opdlab validate`` then takes ``ROOT/evaluations/NAME-{settings}``. ``opdlab fit`` makes a subfolder
            for each evaluation of each run.
    """

    pass_at: tuple[int, ...] = (1, 8)
    reverse_kl: bool = False
    teacher: bool = True
    seed: int = 0
    samples: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.pass_at), "pass_at is empty: give at least one k")
        wrong = next((k for k in self.pass_at if k < 1), None)
        require(wrong is None, f"pass_at has {wrong}, but k must be at least 1")
        require(self.samples != "", "samples is empty: give a folder, or null")

    def check(self, sampling: SamplingConfig) -> None:
        """Refuse a k that the number of samples cannot support."""
        for k in self.pass_at:
            require(
                k <= sampling.num_samples,
                f"model.evaluation.pass_at has {k}, but model.eval_sampling.num_samples is {sampling.num_samples}: "
                "sample at least as many answers, or lower k",
            )
