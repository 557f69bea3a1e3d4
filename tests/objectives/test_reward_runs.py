"""The verifier's reward in a run: groups of a buffer, and what is refused."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import DemonstrationConfig
from opdlab.errors import UsageError
from opdlab.objectives import SampledTokenOPD
from opdlab.types import Rollouts
from opdlab.verifiers import Verdict, Verifier
from tests.toy_run import Run

MakeRun = Callable[..., Run]


class Parity(Verifier):
    """Accepts responses whose characters have an odd sum, so that both verdicts occur."""

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        return [Verdict(sum(map(ord, response)) % 2 == 1, None, "parity") for response in responses]


@dataclass
class Batches(Callback):
    """Keeps the rollouts of each step."""

    rollouts: list[Rollouts] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch.rollouts)


def test_groups_are_those_of_the_buffer(make_run: MakeRun) -> None:
    batches = Batches()
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5), sampling={"num_samples": 3}, callbacks=(batches,))
    run.data.train_source.verifier = Parity()
    run.fit(3)  # one pass over a buffer of 24 rollouts
    ids = torch.cat([rollouts.prompt_ids for rollouts in batches.rollouts])
    columns = [[getattr(r, name) for r in batches.rollouts] for name in ("correct", "group_accuracy", "group_size")]
    correct, accuracy, size = (torch.cat(column) for column in columns)
    for prompt in set(ids.tolist()):
        of_prompt = ids == prompt
        torch.testing.assert_close(accuracy[of_prompt], correct[of_prompt].float().mean().expand(3))
    assert size.tolist() == [3] * 24
    assert 0 < float(correct.float().mean()) < 1
    shares = [step["train/reward_share"] for step in run.recorder.steps.values()]
    assert all(0 < share < 1 for share in shares)


def test_a_reward_changes_the_run_and_a_weight_of_zero_does_not(make_run: MakeRun) -> None:
    losses = []
    for verifier, weight in ((None, 0.0), (Parity(), 0.0), (Parity(), 0.5)):
        run = make_run(objective=SampledTokenOPD(reward_weight=weight))
        run.data.train_source.verifier = verifier
        run.fit(3)
        losses.append(run.recorder.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_reward_needs_a_verifier_and_several_samples(make_run: MakeRun) -> None:
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5))
    run.data.train_source.verifier = None
    words = "reward_weight 0.5, which needs the verifier's verdict .* data.train has no verifier: give it one, or set"
    with pytest.raises(UsageError, match=words):
        run.fit(1)
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5), sampling={"num_samples": 1})
    with pytest.raises(UsageError, match="model.sampling.num_samples is 1: raise it to 2 or more"):
        run.fit(1)
    demonstrated = {"demonstrations": DemonstrationConfig(0.5, "solution")}  # of which no verdict is compared
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5), data=demonstrated)
    with pytest.raises(UsageError, match="data.demonstrations.share is 0.5, which leaves 1 of 2 to be sampled: lower"):
        run.fit(1)
    demonstrated["demonstrations"] = DemonstrationConfig(0.66, "solution")  # 16 of 24 rollouts: 2 of 3 for each prompt
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5), data=demonstrated, sampling={"num_samples": 3})
    with pytest.raises(UsageError, match="share is 0.66, which leaves 1 of 3 to be sampled: lower"):
        run.fit(1)


@pytest.mark.parametrize(
    ("share", "samples", "singles", "message"),
    [
        (0.5, 3, 4, "leaves 1 of model.sampling.num_samples 3 for 4 of the 8 prompts of a buffer and 2 for the others"),
        (0.5, 4, 0, ""),
        (0.1, 2, 2, "raise model.sampling.num_samples to 3, or lower the share"),
        (0.1, 3, 0, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nobody sampled the tokens")
def test_a_single_verdict_is_warned_of(
    make_run: MakeRun, share: float, samples: int, singles: int, message: str
) -> None:
    batches, data = Batches(), {"demonstrations": DemonstrationConfig(share, "solution")}
    sizes: dict[str, Any] = {"sampling": {"num_samples": samples}, "max_new_tokens": 4}
    run = make_run(objective=SampledTokenOPD(reward_weight=0.5), data=data, callbacks=(batches,), **sizes)
    warned = pytest.warns(UserWarning, match=f"share is {share}, which.*{message}") if message else nullcontext()
    with warned:
        run.fit(samples)  # one pass over a buffer of 8 prompts
    found: dict[int, int] = {}
    for each in batches.rollouts:
        assert each.group_size is not None
        found |= dict(zip(each.prompt_ids.tolist(), each.group_size.tolist(), strict=True))
    assert sum(size < 2 for size in found.values()) == singles


def test_one_sample_is_refused_before_models_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model.objective sampled_token --model.objective.reward_weight 1 --model.sampling.num_samples 1"
    call = ["fit", "-c", "quickstart", "--model.student.path", "nowhere", *options.split()]
    assert main(call) == EXIT_USAGE
    assert "model.sampling.num_samples is 1: raise it to 2 or more" in capsys.readouterr().err
    shared = "--data.demonstrations.share 1 --data.demonstrations.field solution --model.sampling.num_samples 8"
    assert (
        main(["fit", "-c", "quickstart", "--model.student.path", "nowhere", *options.split(), *shared.split()])
        == EXIT_USAGE
    )
    assert "share is 1.0, which leaves 0 of 8 to be sampled: lower it" in capsys.readouterr().err
