"""Tester for gates: the laws that every gate obeys, built-in or third-party.

Shapes: B rollouts, T response tokens. Log-probabilities are in nats.
"""

import functools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from opdlab.gating import GateInputs, Gates, GateStrategy
from opdlab.testing.laws import NO_PATH, Law, LawTester, check, check_equal, class_path, law, yaml_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GateTester(LawTester):
    """Checks that a gate obeys the contract of :class:`opdlab.gating.Gates`.

    Call :meth:`run` for all laws, which prints a line for each, or parametrize a test over :meth:`laws`. Subclassing is
    not needed.

    Args:
        make_gate: builds the gate; called several times.
        tokenizer: passed to the gate's ``setup``, as before training; tokens are then drawn from its vocabulary. None
            takes the toy's for a gate that has a ``setup`` of its own, and no tokenizer for others.
        zero_drift_is_uniform: drift 0 everywhere gives weight 1 everywhere. Set it to False for a gate whose weight
            depends on more than drift.
        init_args: constructor arguments as in a configuration file; None takes them from the attributes of the same
            names.
        num_tokens: T of the batch, at least 8. The default is more than one block of any built-in gate.
        seed: seed of the random batch.

    Example:
        >>> from opdlab.gating import RuleGate
        >>> from opdlab.strategies import Block64Gate
        >>> tester = GateTester(lambda: Block64Gate(tau=2.0))
        >>> tester.run()
        passed    unit_mean
        passed    no_gradient
        ...
        passed    yaml_round_trip
        Block64Gate: 16 laws passed
        >>> tester.unit_mean()  # a law of its own
        >>> class RowCountGate(RuleGate):  # gives a row more weight the more rows come after it
        ...     own_normalization = "mean"
        ...     def weight(self, inputs):
        ...         return torch.arange(len(inputs.mask), 0, -1).unsqueeze(1).expand(inputs.mask.shape)
        >>> GateTester(RowCountGate, zero_drift_is_uniform=False).row_permutation_equivariance()
        Traceback (most recent call last):
        ...
        AssertionError: law 'row_permutation_equivariance' does not hold for RowCountGate(...): weights at row 0, ...

        In a test file::

            @pytest.mark.parametrize(("name", "law"), GateTester(MyGate).laws())
            def test_my_gate(name, law):
                law()
    """

    def __init__(
        self,
        make_gate: Callable[[], GateStrategy],
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        zero_drift_is_uniform: bool = True,
        init_args: Mapping[str, Any] | None = None,
        num_tokens: int = 150,
        seed: int = 0,
    ) -> None:
        self._build(make_gate, "GateTester", "make_gate", "MyGate(width=3)")
        self._make_gate = make_gate
        if tokenizer is None and type(make_gate()).setup is not GateStrategy.setup:
            from opdlab.toy import chain_tokenizer

            tokenizer = chain_tokenizer()
        self._tokenizer = tokenizer
        self._zero_drift_is_uniform = zero_drift_is_uniform
        self._init_args = init_args
        self._num_tokens = num_tokens
        self._seed = seed

    def laws(self) -> list[tuple[str, Law]]:
        """Return (name, law) for each law that applies; a law is called without arguments and raises if broken.

        ``yaml_round_trip`` is skipped for a class without an importable path, such as one defined inside a function or
        in a notebook.
        """
        skipped = self.left_out()
        return [pair for pair in super().laws() if pair[0] not in skipped]

    def left_out(self) -> dict[str, str]:
        """Return the laws that do not apply, each with the reason."""
        reasons = {} if self._zero_drift_is_uniform else {"zero_drift_gives_ones": "zero_drift_is_uniform is False"}
        if class_path(type(self._make_gate())) is None:
            reasons["yaml_round_trip"] = NO_PATH
        return reasons

    def subject(self) -> GateStrategy:
        """Return the gate that messages name."""
        return self.gate()

    def gate(self) -> GateStrategy:
        """Return a new gate after ``setup``."""
        gate = self._make_gate()
        if self._tokenizer is not None:
            gate.setup(self._tokenizer)
        return gate

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> GateInputs:
        """Return the batch for the laws, [5, T]: rows full, short, with holes, of one token, and empty."""
        generator = torch.Generator().manual_seed(self._seed)
        shape = (5, self._num_tokens)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[1, self._num_tokens // 2 :] = False
        mask[2] = torch.rand(self._num_tokens, generator=generator) < 0.5
        mask[3, 1:] = False
        mask[4] = False
        behavior = -3 * torch.rand(shape, generator=generator)
        drift = 0.5 * torch.randn(shape, generator=generator) + torch.tensor([0.0, 0.5, -0.5, 1.0, 0.0]).unsqueeze(1)
        inputs = GateInputs(
            tokens=torch.randint(len(self._tokenizer) if self._tokenizer else 32, shape, generator=generator),
            mask=mask,
            behavior_logprobs=behavior,
            current_logprobs=behavior + drift,
            teacher_logprobs=-3 * torch.rand(shape, generator=generator),
            position_losses=torch.randn(shape, generator=generator),
            entropy=3 * torch.rand(shape, generator=generator),
            teacher_entropy=3 * torch.rand(shape, generator=generator),
            correct=torch.tensor([[1], [0], [-1], [1], [0]], dtype=torch.int8).expand(shape),
            divergence=2 * torch.rand(shape, generator=generator),
            compatible_mass=torch.rand(shape, generator=generator),
            age=torch.tensor([[0.0], [3.0], [1.0], [7.0], [0.0]]).expand(shape),
        )
        return inputs.map(lambda value: value.to(device, dtype if value.is_floating_point() else value.dtype))

    @law
    def unit_mean(self) -> None:
        """Check that weights have mean 1 over valid positions, or satisfy the gate's bound under ``none``."""
        self._check_weights(self.inputs())

    @law
    def no_gradient(self) -> None:
        """Check that weights have no gradient for any inputs, and that segment ids are long."""
        inputs = self.inputs().map(lambda value: value.requires_grad_(value.is_floating_point()))
        gates = self.gate()(inputs)
        for name, value in vars(gates).items():
            check(value is None or not value.requires_grad, f"{name} requires grad")
        check(gates.segment_ids.dtype == torch.long, f"segment_ids are {gates.segment_ids.dtype}, not torch.int64")

    @law
    def masked_positions_are_blank(self) -> None:
        """Check that masked positions have weight 0, drift 0 and segment id -1."""
        inputs, _, gates = self._applied()
        for name, value in _maps(gates).items():
            check(value.shape == inputs.mask.shape, f"{name} is {list(value.shape)} and not {list(inputs.mask.shape)}")
            blank = torch.full_like(value, -1 if name == "segment_ids" else 0)
            check_equal(f"{name} behind the mask,", value.where(~inputs.mask, blank), blank)

    @law
    def garbage_behind_the_mask_has_no_influence(self) -> None:
        """Check that NaN, infinities and unknown tokens at masked positions change no bit of the output."""
        inputs, gate, expected = self._applied()
        for garbage, token in ((torch.nan, 1), (torch.inf, -1), (-torch.inf, 2**40), (1e30, 0)):
            soiled = inputs.map(
                lambda value, fill=garbage: value.where(inputs.mask, fill) if value.is_floating_point() else value  # type: ignore[misc]
            )
            soiled = replace(soiled, tokens=inputs.tokens.where(inputs.mask, token))
            _check_gates(f"with {garbage} and token {token} behind the mask,", gate(soiled), expected)

    @law
    def mask_dtype_has_no_influence(self) -> None:
        """Check that a numeric mask gives the same output as a boolean mask."""
        inputs, gate, expected = self._applied()
        for dtype in (torch.long, torch.float32):
            _check_gates(f"mask as {dtype},", gate(replace(inputs, mask=inputs.mask.to(dtype))), expected)

    @law
    def padding_invariance(self) -> None:
        """Check that more padding columns do not change the output."""
        inputs, gate, expected = self._applied()
        for num_columns in (1, 77):
            wider = inputs.map(functools.partial(torch.nn.functional.pad, pad=(0, num_columns)))
            seen = Gates(**{name: value[:, : self._num_tokens] for name, value in _maps(gate(wider)).items()})
            _check_gates(f"with {num_columns} more columns of padding,", seen, expected, tolerance=1e-6)

    @law
    def row_permutation_equivariance(self) -> None:
        """Check that a permutation of the rows permutes the output."""
        inputs, gate, unpermuted = self._applied()
        order = torch.tensor([3, 0, 4, 2, 1])
        expected = Gates(**{name: value[order] for name, value in _maps(unpermuted).items()})
        _check_gates("", gate(inputs.map(lambda value: value[order])), expected, tolerance=1e-6)

    @law
    def zero_drift_gives_ones(self) -> None:
        """Check that every valid weight is 1 if student and behavior policy agree."""
        inputs = self.inputs()
        gates = self.gate()(replace(inputs, current_logprobs=inputs.behavior_logprobs))
        check_equal("weights at drift 0,", gates.weights, inputs.mask.float(), tolerance=1e-6)

    @law
    def uniform_gates_give_ones(self) -> None:
        """Check that a gate declared ``uniform`` gives every valid position weight 1."""
        inputs, gate, gates = self._applied()
        if gate.uniform:
            check_equal("weights,", gates.weights, inputs.mask.float(), tolerance=1e-6)

    @law
    def segments_are_numbered_from_zero(self) -> None:
        """Check that the n segments of a row have ids 0 to n-1."""
        inputs, _, gates = self._applied()
        for row, (ids, mask) in enumerate(zip(gates.segment_ids, inputs.mask, strict=True)):
            seen = ids[mask].unique().tolist()
            check(seen == list(range(len(seen))), f"the segment ids of row {row} are {seen}")

    @law
    def segment_drift_is_the_mean(self) -> None:
        """Check that the drift of a segment is the signed mean over its positions."""
        inputs, _, gates = self._applied()
        expected = torch.zeros_like(inputs.drift)
        for row, ids in enumerate(gates.segment_ids):
            for index in ids[inputs.mask[row]].unique():
                expected[row, ids == index] = inputs.drift[row, ids == index].mean()
        check_equal("segment_drift", gates.segment_drift, expected, tolerance=1e-5)

    @law
    def inputs_are_not_modified(self) -> None:
        """Check that the gate does not modify its inputs."""
        inputs = self.inputs()
        before = inputs.map(torch.clone).tensors()
        self.gate()(inputs)
        for name, value in inputs.tensors().items():
            check_equal(f"{name} after the call,", value, before[name])

    @law
    def pickling_round_trip(self) -> None:
        """Check that a pickled gate gives the same weights."""
        inputs, gate, expected = self._applied()
        _check_gates("after pickling,", pickle.loads(pickle.dumps(gate))(inputs), expected)

    @law
    def devices_and_dtypes(self) -> None:
        """Check for inputs of each floating dtype: weights are float32, on the inputs' device, and keep their mean."""
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                self._check_weights(self.inputs(dtype, device), f"inputs {dtype} on {device}: ")

    @law
    def extreme_inputs(self) -> None:
        """Check that weights are finite for drifts of 1e6 nats, one-token responses, no rows, and full masking."""
        batch = self.inputs()
        sign = torch.where(torch.arange(self._num_tokens) % 3 == 0, 1.0, -1.0).expand(batch.mask.shape)
        alone = torch.zeros_like(sign).index_fill(1, torch.tensor([0]), 1.0)
        for direction in (torch.ones_like(sign), -torch.ones_like(sign), sign, alone):
            inputs = replace(batch, current_logprobs=batch.behavior_logprobs + 1e6 * direction)
            first = inputs.map(lambda value: value[:, :1])
            no_rows = inputs.map(lambda value: value[:0])
            masked = replace(inputs, mask=torch.zeros_like(inputs.mask))
            cases = {"": inputs, "T = 1, ": first, "no rows, ": no_rows, "all masked, ": masked}
            for case, value in cases.items():
                self._check_weights(value, f"{case}drifts up to 1e6 nats: ")

    @law
    def yaml_round_trip(self) -> None:
        """Check that a gate written to YAML (``class_path``, ``init_args``) and read again gives the same weights."""
        gate = self._make_gate()
        arguments = self._init_args
        if arguments is None:
            keys = ArgumentParser().add_class_arguments(type(gate), "gate", fail_untyped=False)
            names = [key.removeprefix("gate.") for key in keys]
            options = gate.normalization.options
            missing = ", ".join(name for name in names if name not in options and not hasattr(gate, name))
            check(not missing, f"no attribute holds the argument {missing}: store it, or give init_args")
            arguments = {name: options.get(name, getattr(gate, name, None)) for name in names}
        copy, text = yaml_copy(gate, GateStrategy, arguments)
        if self._tokenizer is not None:
            copy.setup(self._tokenizer)
        inputs, _, expected = self._applied()
        _check_gates(f"after a round trip through {text!r},", copy(inputs), expected)

    def _applied(self) -> tuple[GateInputs, GateStrategy, Gates]:
        """Return the batch, a gate, and its output for the batch."""
        inputs, gate = self.inputs(), self.gate()
        return inputs, gate, gate(inputs)

    def _check_weights(self, inputs: GateInputs, case: str = "") -> None:
        """Check that weights are finite, at least 0, and have the mean of the gate's normalization."""
        gate = self.gate()
        gates = gate(inputs)
        for name, value in _maps(gates).items():
            check(value.device == inputs.mask.device, f"{case}{name} is on {value.device}")
            check(bool(value.isfinite().all()), f"{case}{name} holds {value[~value.isfinite()][:1].tolist()}")
        check(gates.weights.dtype == torch.float32, f"{case}weights are {gates.weights.dtype} instead of torch.float32")
        valid = gates.weights[inputs.mask].double()
        if not len(valid):
            return
        check(valid.min().item() >= 0, f"{case}the smallest weight is {valid.min().item()}")
        if gate.normalization.name == "none":
            largest, most = valid.max().item(), gate.max_gate
            check(largest <= most * (1 + 1e-6), f"{case}the largest weight is {largest}, above {most:g}")
        else:
            check(abs(valid.mean().item() - 1) <= 1e-5, f"{case}the mean weight is {valid.mean().item()} instead of 1")


def _maps(gates: Gates) -> dict[str, Tensor]:
    """Return the tensors with a value per position."""
    return {name: value for name, value in vars(gates).items() if name != "tau"}


def _check_gates(case: str, seen: Gates, expected: Gates, tolerance: float = 0.0) -> None:
    for name, value in _maps(seen).items():
        check_equal(f"{case} {name}".strip(), value, getattr(expected, name), tolerance)
