"""Replaying steps: recorded losses to the bit, and gradients against plain formulas and autograd."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.callbacks import PoolRecorder
from opdlab.errors import UsageError
from opdlab.gating import GateInputs, GateStrategy, RuleGate, build_gate
from opdlab.objectives import FullDivergence, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.replay import Grid, RecordedStep, ReplayConfig, Replayer, Variant, expand, read_record, record_folders
from opdlab.replay.comparison import PLOTTED_TAUS, Row, effective_sample_size
from opdlab.replay.step_gradients import mixtures, sketch
from opdlab.rollouts import Rollouts
from opdlab.tau import EffectiveSampleSizeTau
from opdlab.types import Prompt
from tests.toy_run import Run

MakeRun = Callable[..., Run]
SMALL = Grid(gates=("block32", "token"), statistics=("signed_mean",), normalizations=("mean", "none"), taus=(5.0,))


def recorded(make_run: MakeRun, steps: list[int], **options: Any) -> tuple[Run, list[RecordedStep]]:
    run = make_run(callbacks=(PoolRecorder(steps=steps),), **options)
    trainer = run.fit(max(steps))
    assert trainer.log_dir is not None
    return run, [read_record(folder) for folder in record_folders(Path(trainer.log_dir)).values()]


def replayer(run: Run, grid: Grid = SMALL, prompts: Sequence[Prompt] = (), **config: Any) -> Replayer:
    return Replayer(run.module, grid, ReplayConfig(draws=2, **config), nullcontext, prompts)


def row_of(rows: Sequence[Row], **values: Any) -> Row:
    (found,) = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "none"},
        {"gate": "block32"},
        {"gate": "block32", "tau": EffectiveSampleSizeTau(0.8)},
        {"gate": "span", "accumulate": 2, "reduction": "sequence_mean"},
        {"gate": "token", "accumulate": 4, "objective": SampledTokenOPD()},
        {"gate": "block32", "accumulate": 2, "objective": SupportDivergence("jsd", "union", "drop", k=4)},
        {"gate": "block64", "accumulate": 2, "objective": FullDivergence("jsd")},
    ],
    ids=["none", "block32", "adaptive_tau", "accumulated_spans", "accumulated_tokens", "union", "whole vocabulary"],
)
def test_the_runs_own_gate_gives_its_losses_to_the_bit(make_run: MakeRun, options: dict[str, Any]) -> None:
    run, records = recorded(make_run, [1, 3, 4], **options)
    for record in records:
        result = replayer(run).replay(record)
        assert result.replayed_loss == result.recorded_loss == run.recorder.steps[record.number]["train/loss"]
        assert result.replayed_norm == pytest.approx(result.recorded_norm, rel=1e-4)
        own = row_of(result.rows, own=True)
        assert own["loss"] == result.recorded_loss
        assert own["gradient_norm"] == pytest.approx(result.replayed_norm, rel=2e-2)


def plain_gradient(run: Run, record: RecordedStep, gate: GateStrategy, part: Tensor | None = None) -> Tensor:
    """Of the gated sampled-token loss without clipping, in float64, from logits of the whole vocabulary."""
    model, (batch,) = copy.deepcopy(run.module.student.model).double(), record.batches
    rollouts, teacher = batch.rollouts, batch.targets.logprobs
    width = rollouts.prompt_tokens.shape[1]
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.mask], 1)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask.long(), position_ids=places).logits[:, width - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, rollouts.tokens[..., None]).squeeze(2)
    behavior = rollouts.behavior_logprobs
    weights = gate(GateInputs(rollouts.tokens, rollouts.mask, behavior, logprobs.detach())).weights
    loss = -(logprobs - behavior).exp() * (teacher - behavior)
    counted = rollouts.mask if part is None else rollouts.mask & part
    total = (weights * loss)[counted].sum() / rollouts.mask.sum()
    gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_gradients_are_those_of_the_formulas_on_paper(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], objective=SampledTokenOPD(clip=None), refresh=8)
    result = replayer(run, tolerance=0.0).replay(record)
    record.load_weights(run.module.student)
    ungated = plain_gradient(run, record, build_gate("none"))
    for name, normalization in (("block32", "mean"), ("token", "none")):
        expected = plain_gradient(run, record, build_gate(name, tau=5.0, normalization=normalization))
        row = row_of(result.rows, gate=name, normalization=normalization)
        assert row["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
        cosine = torch.nn.functional.cosine_similarity(expected, ungated, dim=0)
        assert row["ungated_cosine"] == pytest.approx(float(cosine), abs=1e-4)
        assert float(cosine) < 0.999


def test_parts_are_gradients_of_their_positions_alone(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], objective=SampledTokenOPD(clip=None), refresh=8)
    result = replayer(run, tolerance=0.0, parts=True).replay(record)
    record.load_weights(run.module.student)
    rollouts = record.batches[0].rollouts
    texts = run.module.student.tokenizer.convert_ids_to_tokens(rollouts.tokens.flatten().tolist())
    digits = torch.tensor([text.isdigit() for text in texts]).view_as(rollouts.tokens)
    last = torch.zeros_like(digits)
    for row, length in enumerate(rollouts.num_tokens.tolist()):
        last[row, -(-3 * length // 4) : length] = True
    with torch.no_grad():
        scored = run.module.student.score(rollouts)
        drift = scored.padded(scored.statistics().logprobs) - rollouts.behavior_logprobs
    assert float(drift[rollouts.mask].mean()) != pytest.approx(float(drift[rollouts.mask].abs().mean()), rel=0.1)
    for gate, options in (("none", {}), ("block32", {"tau": 5.0})):
        for name, part in (("digit", digits), ("quarter 4", last)):
            expected = plain_gradient(run, record, build_gate(gate, **options), part)
            found = row_of(result.parts, gate=gate, part=name)
            assert found["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)
            assert found["positions"] == int((rollouts.mask & part).sum())
            assert found["drift_size"] == pytest.approx(float(drift[rollouts.mask & part].abs().mean()), rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parts_add_up_to_the_whole(make_run: MakeRun, accumulate: int) -> None:
    run, (record,) = recorded(make_run, [4], refresh=8, accumulate=accumulate)
    result = replayer(run, parts=True, tolerance=0.0).replay(record)
    assert {row["gate"] for row in result.parts} == {"none", "token", "block32"}
    for gate, normalization in (("none", None), ("token", "mean"), ("block32", "mean")):
        rows = {row["part"]: row for row in result.parts if row["gate"] == gate}
        whole = row_of(result.rows, gate=gate, normalization=normalization)
        quarters, kinds = (
            [row for name, row in rows.items() if (str(name).startswith("quarter")) == is_quarter]
            for is_quarter in (True, False)
        )
        kinds = [row for row in kinds if row["part"] != "first tokens"]
        assert len(quarters) == 4
        assert len(kinds) > 1
        along = [sum(float(row["fresh_projection"] or 0) for row in found) for found in (quarters, kinds)]
        assert along[0] == pytest.approx(along[1], rel=1e-3)
        assert abs(along[0]) <= float(whole["gradient_norm"] or 0) * 1.001
        for found in (quarters, kinds):
            for share in ("position_share", "weight_share"):
                assert sum(float(row[share] or 0) for row in found) == pytest.approx(1)
            mean = sum(float(row["position_share"] or 0) * float(row["weight_mean"] or 0) for row in found)
            assert mean == pytest.approx(whole["weight_mean"], rel=1e-5)


def test_parts_of_other_objectives_stand_beside(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], refresh=8)
    config = ReplayConfig(draws=2, parts=True)
    result = Replayer(run.module, SMALL, config, nullcontext, objectives=["sampled_token"]).replay(record)
    assert {row["objective"] for row in result.parts} == {"teacher_topk", "sampled_token"}
    without = replayer(run).replay(record)
    assert not without.parts
    assert result.num_backward > 2 * without.num_backward


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts one after the other, nobody's log-probabilities known."""
    prompt, response = (max(getattr(part, n).shape[1] for part in parts) for n in ("prompt_tokens", "tokens"))

    def padded(part: Rollouts, name: str) -> Tensor:
        value: Tensor = getattr(part, name)
        if name.startswith("prompt_") and value.ndim == 2:
            return torch.nn.functional.pad(value, (prompt - value.shape[1], 0))
        return torch.nn.functional.pad(value, (0, response - value.shape[1])) if value.ndim == 2 else value

    names = [name for name, value in parts[0].state_dict().items() if torch.is_tensor(value)]
    values: dict[str, Any] = {name: torch.cat([padded(part, name) for part in parts]) for name in names}
    return replace(parts[0], **{**values, "behavior_logprobs": torch.zeros(values["tokens"].shape)})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fresh_rollouts_that_are_the_recorded_ones_give_the_ungated_gradient(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    # LSM's gradient does not depend on the sampling policy.
    run, (record,) = recorded(make_run, [3], objective=TeacherTopK(k=8), accumulate=accumulate)
    seen: list[Any] = []

    def same(prompts: Any, prompt_ids: Any, **options: Any) -> Any:
        seen.append(prompts)
        return joined([batch.rollouts for batch in record.batches] * 2)

    # Sampling is random: this is the only way to get the recorded rollouts again.
    monkeypatch.setattr(run.module.behavior, "sample", same)
    result = replayer(run).replay(record)
    ungated = result.rows[0]
    assert ungated["gate"] == "none"
    assert ungated["fresh_cosine"] == pytest.approx(1, abs=1e-5)
    assert ungated["fresh_norm_ratio"] == pytest.approx(1, abs=1e-4)
    assert result.ceilings["fresh"] == pytest.approx(1, abs=1e-5)
    changed = row_of(result.rows, gate="token", normalization="mean")
    assert changed["fresh_cosine"] == pytest.approx(changed["ungated_cosine"], abs=1e-4)
    assert changed["fresh_change"] == pytest.approx(float(str(changed["ungated_cosine"])) - 1, abs=1e-4)
    recorded_rows = [
        row[mask].tolist()
        for batch in record.batches
        for row, mask in zip(batch.rollouts.prompt_tokens, batch.rollouts.prompt_mask, strict=True)
    ]
    assert [list(prompt) for prompt in seen[0]] == recorded_rows * 2


def test_fresh_rollouts_are_sampled_anew_and_repeatably(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], objective=SampledTokenOPD(), refresh=8)
    first, again, other = (replayer(run, seed=seed).replay(record) for seed in (0, 0, 1))
    assert first.rows == again.rows
    assert first.rows[0]["fresh_cosine"] != other.rows[0]["fresh_cosine"]
    assert first.rows[0]["gradient_norm"] == other.rows[0]["gradient_norm"]
    assert -1 < first.ceilings["fresh"] < 0.9999  # two draws differ


def test_other_prompts_are_other_prompts(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (record,) = recorded(make_run, [2])
    assert run.data.train_prompts is not None
    prompts = run.data.train_prompts.prompts
    used = {prompts[int(i)].tokens for batch in record.batches for i in batch.rollouts.prompt_ids}
    asked: list[list[tuple[int, ...]]] = []
    sample = run.module.behavior.sample

    def watched(prompts: Any, *arguments: Any, **options: Any) -> Rollouts:
        asked.append(prompts)
        return sample(prompts, *arguments, **options)

    # The prompts of fresh rollouts appear in no result.
    monkeypatch.setattr(run.module.behavior, "sample", watched)
    result = replayer(run, prompts=prompts, other_prompts=True).replay(record)
    same, others = asked
    assert set(same) == used
    assert len(others) == len(same) == 16
    assert not set(others) & used
    assert len(set(others[:8])) == 8
    assert {"fresh", "other"} == set(result.ceilings)
    assert all(isinstance(row["other_cosine"], float) for row in result.rows)
    with pytest.raises(UsageError, match="step 2 uses every training prompt"):
        replayer(run, prompts=[], other_prompts=True).replay(record)


# -- choice of gates --------------------------------------------------------------------------------------------------


class Verdict(RuleGate):
    needs = ("correct",)

    def weight(self, inputs: GateInputs) -> Tensor:
        return torch.ones_like(inputs.drift)


def label(variant: Variant) -> str:
    tau = f"{variant.tau:g}" if isinstance(variant.tau, float) else variant.tau
    parts = (variant.gate, variant.statistic, variant.normalization, tau and f"tau {tau}")
    return " ".join(part for part in parts if part)


def test_the_grid(make_run: MakeRun) -> None:
    tokenizer = make_run().module.student.tokenizer
    own = build_gate("block64", tau=3.0, rho=0.9)
    variants, skipped = expand(Grid(), own, tokenizer, {"teacher_logprobs", "teacher_entropy", "entropy"})
    assert skipped == {
        "sign_consistency": "needs correct, which the record does not have",
        "rg_opd": "needs correct, which the record does not have",
        "f_opd": "needs age, which the record does not have",
        "tip": "needs divergence, which the record does not have",
        "ta_opd": "needs divergence, compatible_mass, which the record does not have",
    }
    labels = [label(variant) for variant in variants]
    assert len(set(labels)) == len(labels)
    drifting = [v for v in variants if v.gate == "span"]
    assert len(drifting) == 4 * 4 * 3
    assert [label(v) for v in variants if v.gate == "ratio_mask"] == [
        f"ratio_mask {normalization}" for normalization in ("mean", "residual", "clipped", "none")
    ]
    assert label(variants[0]) == "none"
    (mine,) = [v for v in variants if v.own]  # tau 3 is not in the grid
    assert label(mine) == "block64 signed_mean mean tau 3"
    assert all(v.strategy.normalization.rho == 0.9 for v in variants if v.gate == "block64")
    (paper,) = [v for v in expand(Grid(), build_gate("block64"), tokenizer, ())[0] if v.own]
    assert label(paper) == "block64 signed_mean mean tau 1"
    scheduled, _ = expand(Grid(gates=("token",)), build_gate("token", tau=EffectiveSampleSizeTau(0.5)), tokenizer, ())
    assert [label(v) for v in scheduled if v.own] == ["token signed_mean mean tau schedule"]
    assert "block" not in {v.gate for v in variants}  # with its default size it is block64
    resized, _ = expand(Grid(), build_gate("block", block_size=48), tokenizer, ())
    assert {repr(v.strategy) for v in resized if v.own} == {repr(build_gate("block", block_size=48))}
    assert "block64" in {v.gate for v in resized}


def test_gates_of_ones_own(make_run: MakeRun) -> None:
    tokenizer = make_run().module.student.tokenizer
    name = f"{Verdict.__module__}.Verdict"
    variants, skipped = expand(Grid(gates=(name,)), Verdict(), tokenizer, {"correct"})
    assert [v.gate for v in variants[:2]] == ["none", "Verdict"]
    assert not skipped
    assert "Verdict" in {v.gate for v in expand(Grid(), Verdict(), tokenizer, {"correct"})[0]}
    with pytest.raises(UsageError, match="unknown gate 'blok64'; did you mean 'block64'"):
        expand(Grid(gates=("blok64",)), Verdict(), tokenizer, ())
    with pytest.raises(UsageError, match="No module named 'nowhere'"):
        expand(Grid(gates=("nowhere.Gate",)), Verdict(), tokenizer, ())
    with pytest.raises(UsageError, match="which is not a gate"):
        expand(Grid(gates=("pathlib.Path",)), Verdict(), tokenizer, ())


# -- sharing backward passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2, 1e-1])
def test_mixtures_are_as_near_as_they_are_said_to_be(tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.rand(60, 5, generator=generator) @ torch.rand(5, 400, generator=generator)
    weights = torch.cat([torch.ones(1, 400), low_rank + 0.02 * torch.rand(60, 400, generator=generator)])
    weights[7] *= 1e-12
    weights[8] = 0
    importance = torch.rand(400, generator=generator) ** 4
    found = mixtures(weights, importance, tolerance)
    assert found.basis[0] == 0
    left = (found.coefficients @ weights[found.basis].double() - weights) * importance
    size = (weights.double() * importance).norm(dim=1)
    size[8] = 1
    assert float((left.norm(dim=1) / size).max()) <= tolerance * 1.001
    assert len(found.basis) <= (7 if tolerance == 0.1 else 60)
    own = found.coefficients[found.basis] * size[found.basis] / size[found.basis, None]
    assert torch.allclose(own, torch.eye(len(own)).double(), atol=1e-6)


def test_sharing_changes_cosines_by_less_than_the_tolerance(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], refresh=8)
    grid = Grid(gates=("block32", "span", "token", "ratio_mask"), taus=(1.0, 20.0))
    shared, exact = (replayer(run, grid, tolerance=tolerance).replay(record) for tolerance in (0.01, 0.0))
    assert shared.num_backward < exact.num_backward / 3
    for ours, theirs in zip(shared.rows, exact.rows, strict=True):
        for name in ("ungated_cosine", "fresh_cosine"):
            assert ours[name] == pytest.approx(theirs[name], abs=0.01)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.02)


def test_a_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 100_000, generator=generator)
    other = 0.5 * one + two
    parts = [[v[:70_000].view(700, 100), v[70_000:]] for v in (one, other)]
    assert torch.equal(sketch(parts[0]), one)
    size = 10_000
    short = [sketch(part, size) for part in parts]
    assert short[0].shape == (size,)
    error = (short[0] @ short[1] - one @ other) / (one.norm() * other.norm())
    assert abs(float(error)) < 4 / size**0.5
    assert torch.allclose(sketch([3 * p for p in parts[0]], size), 3 * short[0], rtol=1e-4, atol=1e-3)
    assert float((short[0] @ short[0]) / (one @ one)) == pytest.approx(1, abs=0.05)


def test_effective_sample_size() -> None:
    sizes = effective_sample_size(torch.tensor([[1.0, 1, 1, 1], [2.0, 2, 0, 0], [4.0, 0, 0, 0]]))
    assert sizes.tolist() == [1.0, 0.5, 0.25]


def test_the_plotted_sample_sizes_are_those_of_the_papers_weights(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], refresh=8)
    grid = Grid(("block32", "sequence"), ("signed_mean", "rms"), ("mean", "none"), (1.0, 10.0))
    result = replayer(run, grid).replay(record)
    for name in ("block32", "sequence"):
        for tau in grid.taus:
            row = row_of(result.rows, gate=name, statistic="signed_mean", normalization="mean", tau=tau)
            assert result.sample_sizes[name][PLOTTED_TAUS.index(tau)] == pytest.approx(
                row["effective_sample_size"], rel=1e-6
            )


def test_a_gate_that_shrinks_the_step_to_nothing_has_no_cosine(make_run: MakeRun) -> None:
    run, (record,) = recorded(make_run, [4], refresh=8)
    grid = Grid(gates=("token", "sequence"), statistics=("max",), normalizations=("none",), taus=(1e6,))
    rows = replayer(run, grid).replay(record).rows
    row = row_of(rows, gate="sequence")
    assert (row["weight_max"], row["gradient_norm"], row["fresh_cosine"]) == (0, 0, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReplayConfig(draws=1), "--draws is 1"),
        (lambda: ReplayConfig(tolerance=1e-5), "--tolerance is 1e-05"),
        (lambda: Grid(taus=()), "--taus is empty"),
        (lambda: Grid(taus=(-1.0,)), "--taus is -1.0"),
        (lambda: Grid(normalizations=("meen",)), "--normalizations has 'meen'; did you mean 'mean'?"),
    ],
)
def test_options_out_of_range(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        make()
