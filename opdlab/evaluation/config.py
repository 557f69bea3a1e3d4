"""Options of an evaluation."""

from dataclasses import dataclass

from opdlab.errors import require
from opdlab.policies.sampler import SamplingConfig
from opdlab.seeds import checked_seed


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of an evaluation, except those of sampling.

    Args:
        pass_at: values of k; each must be at most ``eval_sampling.num_samples``.
        reverse_kl: also estimate the reverse KL to the teacher per token, ``mean(logpi - logq)`` over the fresh
            samples; costs a pass of student and teacher over them. Unbiased at ``top_p`` 1.
        teacher: evaluate the teacher too, once, when training ends.
        seed: determines the samples; with equal seeds, evaluations differ only by the weights. Null follows
            ``seed_everything``, and with ``opdlab validate --ckpt_path`` the checkpoint's run; in Python it means 0.
        samples: folder for the samples, which are written batch by batch; an interrupted evaluation resumes from it.
            ``{settings}`` in it is replaced by a digest of weights and settings. ``opdlab fit`` creates a subfolder for
            each evaluation of each run. None writes no samples from Python; ``opdlab fit`` then uses ``evaluations`` in
            the run's folder, and ``opdlab validate`` ``ROOT/evaluations/NAME-{settings}``.
    """

    pass_at: tuple[int, ...] = (1, 8)
    reverse_kl: bool = False
    teacher: bool = True
    seed: int | None = None
    samples: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.pass_at), "pass_at is empty: give at least one k")
        wrong = next((k for k in self.pass_at if k < 1), None)
        require(wrong is None, f"pass_at has {wrong}, but k must be at least 1")
        if self.seed is not None:
            checked_seed(self.seed)
        require(self.samples != "", "samples is empty: give a folder, or null")

    def check(self, sampling: SamplingConfig) -> None:
        """Raise a UsageError if a k exceeds the number of samples."""
        for k in self.pass_at:
            require(
                k <= sampling.num_samples,
                f"model.evaluation.pass_at has {k}, but model.eval_sampling.num_samples is {sampling.num_samples}: "
                "sample at least as many answers, or lower k",
            )
