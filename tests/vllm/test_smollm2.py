"""The real vLLM with SmolLM2-135M: reverse KL as with the loop here, printed by `make test-vllm`."""

from pathlib import Path

import pytest

from opdlab.policies import (
    LanguageModel,
    LocalTeacher,
    ServedTeacher,
    Teacher,
    TeacherRequest,
    TransformersSampler,
    VLLMSampler,
)
from opdlab.types import Rollouts
from tests.vllm.engines import said, served, server, taken

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def student(pair: Path) -> LanguageModel:
    return LanguageModel(str(pair / "student")).eval()


@pytest.fixture(scope="module")
def in_process(student: LanguageModel) -> VLLMSampler:
    sampler = VLLMSampler(max_model_len=512, enforce_eager=True)
    sampler.setup(student)
    return sampler


def reverse_kl(rollouts: Rollouts, teacher: Teacher) -> tuple[float, float]:
    """Return the mean of logpi - logq over the tokens, and the standard error from the rollouts' sums."""
    difference = (rollouts.behavior_logprobs - teacher.score(rollouts, TeacherRequest()).logprobs) * rollouts.mask
    sums, lengths = difference.sum(1), rollouts.mask.sum(1)
    mean = float(sums.sum() / lengths.sum())
    errors = (sums - mean * lengths) / lengths.float().mean()
    return mean, float(errors.std() / len(errors) ** 0.5)


def test_the_reverse_kl_is_that_of_the_loop_here(
    in_process: VLLMSampler, student: LanguageModel, pair: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    teacher = LocalTeacher(str(pair / "teacher"))
    values, last = {}, None
    with served(student, pair / "student", tmp_path, "--enforce-eager") as of_server:
        samplers = {"here": TransformersSampler(), "vllm": in_process, "vllm_server": of_server}
        for name, sampler in samplers.items():
            last = taken(sampler, student, prompts, num_samples=8, max_new_tokens=32)
            values[name] = reverse_kl(last, teacher)
            said(f"reverse KL, sampled by {name}: {values[name][0]:.3f} +- {values[name][1]:.3f} nats a token")
    for name in ("vllm", "vllm_server"):
        noise = (values["here"][1] ** 2 + values[name][1] ** 2) ** 0.5
        assert abs(values[name][0] - values["here"][0]) < 4 * noise
    assert last is not None
    with server(pair / "teacher", tmp_path / "log", "--max-model-len", "512", "--enforce-eager") as url:
        other = ServedTeacher(url, timeout=600.0)
        other.bind(student)
        scored = reverse_kl(last, other)[0]
    said(f"reverse KL of the same rollouts, scored by vLLM: {scored:.5f}, here: {values['vllm_server'][0]:.5f}")
    assert scored == pytest.approx(values["vllm_server"][0], abs=1e-3)
