"""Laws of the training step, on real runs of the toy world."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from opdlab.callbacks import EvaluationTable, RunCheckpoint
from opdlab.data import ReuseConfig
from opdlab.data.prompts import prompt_set
from opdlab.errors import UsageError
from opdlab.evaluation import EvaluationConfig
from opdlab.gating import GateInputs, RuleGate, build_gate
from opdlab.module import NonFiniteLossError, OPDModule
from opdlab.objectives import Objective, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import (
    BehaviorPolicy,
    LanguageModel,
    LocalTeacher,
    SamplingConfig,
    TeacherRequest,
    language_model,
)
from opdlab.policies.passes import Pass
from opdlab.toy import ChainProblems
from opdlab.training import join_gate_inputs, split_gates
from opdlab.types import trimmed
from opdlab.verifiers import Verdict, Verifier
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
UNION = SupportDivergence("forward_kl", "union", "bucket", k=8)
OBJECTIVES = [
    pytest.param(TeacherTopK(k=8), id="lsm"),
    pytest.param(SampledTokenOPD(), id="sampled"),
    pytest.param(UNION, id="union"),
]


class Watch(Callback):
    """Keeps batches, weights and snapshots as they were at every optimizer step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.traces: list[Any] = []
        self.snapshots: list[torch.Tensor] = []
        self.students: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OPDModule)
        self.batches.append(batch)
        self.traces.append(outputs["trace"])
        # BehaviorRefresh acts after this copy only if this callback comes before it; see the test.
        self.snapshots.append(torch.cat([p.flatten() for p in pl_module.behavior.parameters()]).clone())
        self.students.append(torch.cat([p.detach().flatten() for p in pl_module.student.parameters()]).clone())


def test_behavior_changes_only_at_multiples_of_k(make_run: MakeRun) -> None:
    watch = Watch()
    run = make_run(refresh=3, callbacks=(watch,))
    run.fit(7)
    changed = [
        step
        for step, (old, new) in enumerate(zip(watch.snapshots, watch.snapshots[1:], strict=False), start=2)
        if not torch.equal(old, new)
    ]
    assert changed == [3, 6]
    torch.testing.assert_close(watch.snapshots[2], watch.students[2], rtol=0, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_minibatch_after_a_refresh_and_a_fresh_pool_has_no_drift(make_run: MakeRun, objective: Objective) -> None:
    run = make_run(objective=objective, refresh=4)  # a buffer lasts four steps, so both coincide
    run.fit(9)
    steps = run.recorder.steps
    for fresh in (1, 5, 9):
        assert steps[fresh]["train/drift/max"] < 1e-5
        assert steps[fresh]["gate/std"] < 1e-4
        assert steps[fresh]["rollout/age"] == 0
    for stale in (2, 3, 4, 6, 7, 8):
        assert steps[stale]["train/drift/max"] > 1e-3
    assert [steps[step]["rollout/age"] for step in (2, 3, 4)] == [1, 2, 3]
    if isinstance(objective, SampledTokenOPD):
        assert steps[1]["train/clip_share"] == 0


@pytest.mark.parametrize(
    ("refresh", "ages", "line"),
    [
        (None, [0, 1, 2, 3, 0, 1, 2, 3, 0], "refreshed before each rollout buffer"),  # a buffer lasts four steps
        (4, [0, 1, 2, 3, 0, 1, 2, 3, 0], "refreshed after every 4 optimizer steps"),
        (6, [0, 1, 2, 3, 4, 5, 6, 7, 2], "refreshed after every 6 optimizer steps"),
        (100, list(range(9)), "refreshed after every 100 optimizer steps"),
    ],
)
def test_a_callback_alone_decides_when_the_snapshot_is_refreshed(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, refresh: int | None, ages: list[int], line: str
) -> None:
    watch = Watch()
    run = make_run(refresh=refresh, callbacks=(watch,))
    with caplog.at_level("INFO"):
        run.fit(9)
    assert f"behavior snapshot: {line}" in caplog.text
    assert [metrics["rollout/age"] for metrics in run.recorder.steps.values()] == ages
    assert [float(trace.age.float().mean()) for trace in watch.traces] == ages
    fresh = [metrics["train/drift/max"] < 1e-5 for metrics in run.recorder.steps.values()]
    assert fresh == [age == 0 for age in ages]


class Counting(LanguageModel):
    """Keeps the numbers of rollouts that it scores in chunks; the snapshot is a copy and has its own list."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.scored: list[int] = []

    def score_in_chunks(self, rollouts: Any, batch_size: int) -> Any:
        self.scored.append(len(rollouts))
        return super().score_in_chunks(rollouts, batch_size)


class Rounding(BehaviorPolicy):
    """As if the snapshot rounded the student's weights: it scores everything."""

    def equals(self, student: LanguageModel) -> bool:
        return False


class BySnapshot(OPDModule):
    """A module with such a snapshot."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.behavior.__class__ = Rounding


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_snapshot_scores_only_what_the_students_own_pass_does_not(
    make_run: MakeRun, objective: Objective, accumulate: int
) -> None:
    def run(module: type[OPDModule]) -> tuple[Run, Watch, list[int]]:
        watch, student = Watch(), Counting(STUDENT)
        made = make_run(
            module=module, student=student, objective=objective, refresh=4, accumulate=accumulate, callbacks=(watch,)
        )
        made.fit(8)
        scored = made.module.behavior.policy.scored
        assert isinstance(scored, list)
        return made, watch, scored

    by_snapshot, seen, rows = run(BySnapshot)
    assert rows == [16, 16]  # two buffers of 16 rollouts, in optimizer batches of 8
    by_student, own, fewer = run(OPDModule)
    assert fewer == ([16, 16] if objective is UNION else [8, 8])  # the teacher needs the snapshot's tokens of all rows
    torch.testing.assert_close(by_student.recorder.losses, by_snapshot.recorder.losses, rtol=1e-4, atol=1e-6)
    assert by_student.recorder.steps[5]["train/drift/max"] == 0  # the second buffer's first step
    for mine, theirs in zip(own.traces, seen.traces, strict=True):
        assert torch.equal(mine.rollouts.rollout_ids, theirs.rollouts.rollout_ids)
        torch.testing.assert_close(
            mine.rollouts.behavior_logprobs, theirs.rollouts.behavior_logprobs, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_step_that_fills_in_the_behavior_makes_one_pass_over_the_head(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, objective: Objective
) -> None:
    passes: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(language_model, name)

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled():  # not the snapshot's
                passes.append(name)
            return function(*arguments)

        return call

    # The number of passes does not change results: passes are only slow.
    for name in ("token_statistics", "support_statistics", "support_tail"):
        monkeypatch.setattr(language_model, name, counted(name))
    make_run(objective=objective).fit(2)
    assert len(passes) == 2
    assert len(set(passes)) == 1


def test_a_snapshot_that_is_not_the_student_scores_everything(make_run: MakeRun) -> None:
    module = make_run().module
    assert module.behavior.equals(module.student)
    with torch.no_grad():
        next(module.student.parameters()).view(-1)[-1] += 1e-6
    assert not module.behavior.equals(module.student)
    narrow = BehaviorPolicy(module.student, SamplingConfig(), "bfloat16")
    assert not narrow.equals(module.student)


def test_reused_rollouts_keep_their_targets_to_the_bit(make_run: MakeRun) -> None:
    watch = Watch()
    make_run(callbacks=(watch,)).fit(4)  # two passes over one buffer
    seen: dict[int, list[Any]] = {}
    for batch, trace in zip(watch.batches, watch.traces, strict=True):
        for row, rollout_id in enumerate(batch.rollouts.rollout_ids.tolist()):
            length = int(batch.rollouts.num_tokens[row])
            seen.setdefault(rollout_id, []).append(
                (
                    batch.rollouts.tokens[row, :length],
                    trace.rollouts.behavior_logprobs[row, :length],
                    batch.targets.logprobs[row, :length],
                    batch.targets.support_ids[row, :length],
                    batch.targets.support_logits[row, :length],
                )
            )
    assert len(seen) == 16
    for first, second in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gates_touch_neither_targets_nor_supports_nor_tokens(make_run: MakeRun) -> None:
    pools = []
    for gate in ("none", "token", "span"):
        watch = Watch()
        make_run(gate=gate, callbacks=(watch,), refresh=100).fit(2)  # one pass over the first buffer
        pools.append(watch.batches)
    for gated in pools[1:]:
        for plain, other in zip(pools[0], gated, strict=True):
            for mine, theirs in ((plain.rollouts, other.rollouts), (plain.targets, other.targets)):
                for name, value in mine.state_dict().items():
                    same = torch.equal(value, getattr(theirs, name)) if torch.is_tensor(value) else True
                    assert same, name


@pytest.mark.parametrize("gate", ["block32", "none", "sequence"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_accumulation_equals_one_large_batch(make_run: MakeRun, gate: str, reduction: str) -> None:
    whole, parts = (make_run(gate=gate, accumulate=n, reduction=reduction) for n in (1, 4))
    whole.fit(6)
    parts.fit(6)
    torch.testing.assert_close(parts.recorder.losses, whole.recorder.losses, rtol=2e-4, atol=1e-6)
    for name in ("gate/min", "gate/max", "gate/effective_sample_size", "train/drift/token_mean", "train/entropy"):
        of_parts, of_whole = ([m[name] for m in run.recorder.steps.values()] for run in (parts, whole))
        torch.testing.assert_close(of_parts, of_whole, rtol=2e-3, atol=1e-5)
    for ours, theirs in zip(parts.module.student.parameters(), whole.module.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_gradients_of_accumulation_equal_those_of_one_batch(make_run: MakeRun) -> None:
    gradients = []
    for accumulate in (1, 4):
        run = make_run(accumulate=accumulate, refresh=100)
        kept: dict[str, torch.Tensor] = {}

        class Keep(Callback):
            def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
                if trainer.global_step == 2:  # drifted by two steps
                    kept.update({n: p.grad.clone() for n, p in pl_module.student.named_parameters()})  # noqa: B023

        run.trainer_options["callbacks"].append(Keep())
        run.trainer_options["gradient_clip_val"] = None
        run.fit(3)
        gradients.append(kept)
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=5e-3, atol=2e-5, msg=name)


def rollouts_of(module: OPDModule, num_prompts: int = 3) -> Any:
    prompts = prompt_set(ChainProblems(num_prompts), module.student.tokenizer, 100).prompts
    top_k = module.request.behavior_top_k
    return module.behavior.sample([p.tokens for p in prompts], list(range(num_prompts)), seed=1, top_k=top_k)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_equal_to_teacher_learns_nothing(make_run: MakeRun, objective: Objective) -> None:
    run = make_run(objective=objective)
    module = run.module
    module.student.load_state_dict(module.teacher.model.state_dict())  # type: ignore[attr-defined]
    module.behavior.refresh(module.student)
    rollouts = rollouts_of(module)
    targets = module.teacher.score(rollouts, objective.request)
    positions = objective.position_losses(module.student.score(rollouts), rollouts, targets)
    assert positions.losses.abs().max() < 1e-5
    if "advantage" in positions.metrics:
        assert positions.metrics["advantage"].abs().max() < 1e-5


def test_full_support_equals_full_reverse_kl(make_run: MakeRun) -> None:
    module = make_run().module
    rollouts, vocab = rollouts_of(module), module.student.vocab_size
    targets = module.teacher.score(rollouts, TeacherRequest(top_k=vocab))
    positions = TeacherTopK(k=vocab).position_losses(module.student.score(rollouts), rollouts, targets)
    sequence = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)
    attention = torch.cat([rollouts.prompt_mask, rollouts.mask], 1).long()
    start = rollouts.prompt_tokens.shape[1] - 1
    student, teacher = (
        m.model(input_ids=sequence, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0))
        .logits[:, start:-1]
        .double()
        .log_softmax(-1)
        for m in (module.student, module.teacher.model)  # type: ignore[attr-defined]
    )
    full = (student.exp() * (student - teacher)).sum(-1)
    torch.testing.assert_close(positions.losses[rollouts.mask].double(), full[rollouts.mask], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_positions_receive_exactly_zero_gradient(make_run: MakeRun, objective: Objective) -> None:
    module = make_run(objective=objective).module
    rollouts = rollouts_of(module)
    # Mask the tail of each response, and fill it with garbage.
    keep = torch.arange(rollouts.tokens.shape[1]) < 10
    cut = replace(
        rollouts,
        mask=rollouts.mask & keep,
        behavior_logprobs=rollouts.behavior_logprobs.masked_fill(~keep, torch.nan),
    )
    embeddings = []

    def keep_embedding(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embeddings.append(output)

    targets = module.teacher.score(cut, objective.request)
    hook = module.student.model.get_input_embeddings().register_forward_hook(keep_embedding)
    positions = objective.position_losses(module.student.score(cut), cut, targets)
    hook.remove()
    torch.autograd.backward(positions.losses[cut.mask].sum())
    start = cut.prompt_tokens.shape[1]
    gradient = embeddings[0].grad
    assert gradient is not None
    assert gradient[:, start : start + 9].abs().sum() > 0
    assert torch.equal(gradient[:, start + 9 :], torch.zeros_like(gradient[:, start + 9 :]))


def test_only_the_student_is_trained_and_the_teacher_stays_out_of_checkpoints(make_run: MakeRun) -> None:
    module = make_run().module
    optimizer = module.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.student.parameters()}
    assert not any(p.requires_grad for p in module.behavior.parameters())
    assert not any("teacher" in name for name in module.state_dict())


class Exploding(TeacherTopK):
    def position_losses(self, student: Any, rollouts: Any, targets: Any) -> Any:
        positions = super().position_losses(student, rollouts, targets)
        return replace(positions, losses=positions.losses * torch.inf)


def test_adam_takes_the_fused_step_on_a_cpu_and_the_same_step(make_run: MakeRun) -> None:
    """The reference is the formula of AdamW (Loshchilov and Hutter 2019) in double precision."""
    run = make_run()
    optimizer = run.module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert group["fused"]
    parameter = group["params"][0]
    value, rate = parameter.detach().double().clone(), group["lr"]
    (first, second), mean, square = group["betas"], torch.zeros_like(value), torch.zeros_like(value)
    for step in (1, 2, 3):
        for each in group["params"]:
            each.grad = torch.randn_like(each)
        grad = parameter.grad.double()
        mean, square = first * mean + (1 - first) * grad, second * square + (1 - second) * grad**2
        bias_free = (square / (1 - second**step)).sqrt() + group["eps"]
        value = value * (1 - rate * group["weight_decay"]) - rate * mean / (1 - first**step) / bias_free
        optimizer.step()
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_a_non_finite_loss_stops_the_run_and_leaves_the_batch(make_run: MakeRun, tmp_path: Any) -> None:
    with pytest.raises(NonFiniteLossError, match="at step 0 on rollouts \\[") as caught:
        make_run(objective=Exploding(k=4)).fit(2)
    saved = torch.load(tmp_path / "non_finite_loss_step_0.pt", weights_only=True)
    assert str(tmp_path / "non_finite_loss_step_0.pt") in str(caught.value)
    assert saved["rollouts"]["tokens"].shape[0] == 8


def test_a_student_with_nan_weights_is_no_fault_of_the_gate(make_run: MakeRun, tmp_path: Any) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            for parameter in pl_module.student.parameters():  # type: ignore[union-attr]
                parameter.data.fill_(torch.nan)

    with pytest.raises(NonFiniteLossError, match="train/loss is nan at step 1 .* lower the learning rate"):
        make_run(gate="block64", callbacks=(Breaks(),)).fit(3)
    assert (tmp_path / "non_finite_loss_step_1.pt").exists()


@pytest.mark.parametrize("limit", [1, 3, 0.75])
def test_a_pass_that_ends_within_an_optimizer_batch_is_refused(make_run: MakeRun, limit: float) -> None:
    run = make_run(accumulate=2, data={"reuse": ReuseConfig(prompts_per_pool=8, epochs=1, batch_size=16)})
    words = f"limit_train_batches is {limit}, but trainer.accumulate_grad_batches makes a step of 2 micro-batches"
    with pytest.raises(UsageError, match=words):
        run.fit(4, limit_train_batches=limit)
    make_run(accumulate=2).fit(2, limit_train_batches=2)
    make_run(accumulate=1).fit(2, limit_train_batches=limit)
    make_run(accumulate=2).fit(1, fast_dev_run=1)


def test_a_device_without_float64_is_refused(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("mps"))
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda *_: None)
    with pytest.raises(UsageError, match=r"trainer\.accelerator is mps, which has no float64, .* give cpu"):
        make_run().fit(1)


class Negative(RuleGate):
    def weight(self, inputs: GateInputs) -> Any:
        return -inputs.mask.float()


def test_a_gate_with_negative_weights_is_named(make_run: MakeRun) -> None:
    words = "gate is Negative, whose weights are NaN or infinite at step 0: .* at least 0"
    with pytest.raises(UsageError, match=words):
        make_run(gate=Negative()).fit(2)


def test_support_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="objective.k is 99, but the vocabulary has only 38"):
        OPDModule(LanguageModel(STUDENT), LocalTeacher(TEACHER), TeacherTopK(k=99), build_gate("none"))


@pytest.mark.parametrize("budget", [0, -1])
def test_a_bound_on_tokens_below_one_is_refused(make_run: MakeRun, budget: int) -> None:
    words = f"max_tokens_per_pass is {budget}, but must be at least 1: use null for no bound"
    with pytest.raises(UsageError, match=words):
        make_run(max_tokens_per_pass=budget)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bound_on_tokens_changes_no_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, objective: Objective, accumulate: int
) -> None:
    passes: list[int] = []
    states = Pass.states

    def counted(one: Pass, *inputs: Any, **options: Any) -> torch.Tensor:
        passes.append(one.tokens.numel())
        return states(one, *inputs, **options)

    # Count all models in the run, except during sampling: a hook on a model would count that too.
    monkeypatch.setattr(Pass, "states", counted)

    def run(budget: int | None) -> tuple[list[float], torch.Tensor, int]:
        passes.clear()
        run = make_run(objective=objective, accumulate=accumulate, max_tokens_per_pass=budget)
        run.fit(4)
        assert run.module.behavior.policy.max_tokens == budget
        weights = torch.cat([p.detach().flatten() for p in run.module.student.parameters()])
        return run.recorder.losses, weights, len(passes)

    whole, parts = run(None), run(150)
    assert max(passes) > 150  # of the teacher, which has its batch_size
    assert parts[2] > 2 * whole[2]
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=1e-4)


def test_too_few_samples_for_pass_at_k_are_refused() -> None:
    with pytest.raises(UsageError, match="pass_at has 8, but .*num_samples is 4"):
        OPDModule(
            LanguageModel(STUDENT),
            LocalTeacher(TEACHER),
            TeacherTopK(),
            build_gate("none"),
            eval_sampling=SamplingConfig(num_samples=4),
            evaluation=EvaluationConfig(pass_at=(1, 8)),
        )


def test_joined_gate_inputs_split_back() -> None:
    parts = []
    for width in (3, 5):
        values = torch.rand(2, width)
        mask = torch.ones(2, width, dtype=torch.bool)
        parts.append(GateInputs(torch.zeros(2, width).long(), mask, values * 0, -values, values, values))
    joined = join_gate_inputs(parts)
    assert joined.mask.shape == (4, 5)
    gates = split_gates(build_gate("token")(joined), parts)
    assert [g.weights.shape for g in gates] == [(2, 3), (2, 5)]
    total = sum(float(g.weights.sum()) for g in gates)
    assert total == pytest.approx(16, rel=1e-5)


def test_trimming_drops_only_padding(make_run: MakeRun) -> None:
    module = make_run().module
    rollouts = rollouts_of(module)
    targets = module.teacher.score(rollouts, TeacherRequest(top_k=2))
    padded = replace(
        rollouts,
        **{
            name: torch.nn.functional.pad(getattr(rollouts, name), (0, 5))
            for name in ("tokens", "mask", "behavior_logprobs")
        },
    )
    wide = targets.map(lambda t: torch.cat([t, t[:, :5] * 0], 1))
    cut, cut_targets = trimmed(padded, wide)
    torch.testing.assert_close(cut.tokens, rollouts.tokens)
    torch.testing.assert_close(cut_targets.support_logits, targets.support_logits)


def test_validation_logs_pass_at_k_and_their_mean(make_run: MakeRun) -> None:
    run = make_run()
    trainer = pl.Trainer(**{**run.trainer_options, "max_steps": 1, "limit_val_batches": 1.0})
    (figures,) = trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert {"val/toy/pass@1", "val/toy/pass@2", "val/mean/pass@2", "val/toy/truncated"} <= set(figures)
    assert figures["val/toy/pass@1"] == 0  # eight tokens are too few for an answer
    assert figures["val/toy/truncated"] == 1
    with run.module.evaluating("teacher", run.module.teacher.model):  # type: ignore[attr-defined]
        (teacher,) = trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert "teacher/toy/pass@1" in teacher


def test_an_evaluated_model_goes_where_lightning_puts_the_module(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU is one device, so the calls are counted.
    run = make_run()
    trainer = pl.Trainer(**{**run.trainer_options, "limit_val_batches": 1})
    model = run.module.teacher.model  # type: ignore[attr-defined]
    moved: list[bool] = []
    to = model.to

    def spy(device: torch.device) -> Any:
        moved.append(trainer.validating)
        return to(device)

    monkeypatch.setattr(model, "to", spy)
    # Between fit and an evaluation Lightning has moved the module to the host, for every accelerator.
    with run.module.evaluating("teacher", model):
        trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert moved == [True]


def test_evaluations_before_and_within_training_count_anew(make_run: MakeRun) -> None:
    # trainer.validate runs in inference mode, the validation within fit does not: states must not leak.
    run = make_run()
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer = pl.Trainer(**{**run.trainer_options, **options, "max_steps": 2, "num_sanity_val_steps": 0})
    trainer.validate(run.module, datamodule=run.data, verbose=False)
    trainer.fit(run.module, datamodule=run.data)
    metrics = run.module.evaluator.metrics["toy"]
    assert metrics.metrics["pass@1"].num_problems == 3


class FirstOnly(Verifier):
    """Finds an answer in the responses of the first evaluation, and then in none."""

    calls = 0

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        self.calls += 1
        return [Verdict(False, "7" if self.calls == 1 else None, "different") for _ in responses]


@pytest.mark.parametrize("name", ["toy", "train", "eval", "keys"])
def test_an_evaluation_without_answers_has_no_vote_of_an_earlier_one(make_run: MakeRun, name: str) -> None:
    # Names of attributes of a module are names of benchmarks as all others.
    benchmark = ChainProblems(3, "held_out")
    benchmark.verifier = FirstOnly()
    table, checkpoint = EvaluationTable(), RunCheckpoint(f"val/{name}/maj@2", "max", every_n_train_steps=1)
    run = make_run(data={"benchmarks": {name: benchmark}}, callbacks=(table, checkpoint))
    validation: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer = run.fit(2, num_sanity_val_steps=0, enable_checkpointing=True, **validation)
    assert (f"{name}/maj@2" in table.before, f"{name}/maj@2" in table.after) == (True, False)
    assert table.after_step == 2
    assert f"val/{name}/maj@2" not in trainer.callback_metrics
    assert checkpoint.best is not None
    assert checkpoint.best.step == 1
    unknown = RunCheckpoint(f"val/{name}/reverse_kl", "min")  # which is not asked for
    with pytest.raises(UsageError, match="which no evaluation logs"):
        make_run(callbacks=(unknown,)).fit(1, num_sanity_val_steps=0, enable_checkpointing=True, **validation)
