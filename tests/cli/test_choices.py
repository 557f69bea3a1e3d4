"""Gates and objectives as words of a command line, with options."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdlab.cli.choices import chosen_gates, chosen_objectives
from opdlab.errors import UsageError
from opdlab.gating import GateInputs, RuleGate
from opdlab.objectives import SupportDivergence
from opdlab.replay.plugins import Named
from opdlab.strategies import BlockGate


class Halves(RuleGate):
    def __init__(self, share: float = 0.5, names: list[str] | None = None) -> None:
        super().__init__()
        self.share, self.names = share, names

    def weight(self, inputs: GateInputs) -> Tensor:
        return torch.full_like(inputs.drift, self.share)


def test_options_follow_a_name() -> None:
    words = ["sampled_token,support_divergence:tail=drop,k=8", "full_divergence"]
    plain, with_options, last = chosen_objectives(words)
    assert (plain, last) == ("sampled_token", "full_divergence")
    assert isinstance(with_options, Named)
    assert with_options.name == "support_divergence:tail=drop,k=8"
    assert repr(with_options.plugin) == repr(SupportDivergence("reverse_kl", "teacher", "drop", k=8))


def test_gates_and_class_paths_take_options_too(tmp_path: Path) -> None:
    path = f"{__name__}.Halves"
    file = tmp_path / "gates.yaml"
    file.write_text("- token\n- block:block_size=8\n- class_path: block\n  init_args: {block_size: 4, rho: 0.2}\n")
    found = chosen_gates([f"{path}:share=0.25", "{class_path: span, init_args: {max_tokens: 9}}", str(file)])
    names = [each if isinstance(each, str) else each.name for each in found]
    assert names == [
        *("Halves:share=0.25", "span:max_tokens=9", "token", "block:block_size=8"),
        "block:block_size=4,rho=0.2",
    ]
    first, last = found[0], found[-1]
    assert isinstance(first, Named)
    assert isinstance(first.plugin, Halves)
    assert first.plugin.share == 0.25
    assert isinstance(last, Named)
    assert isinstance(last.plugin, BlockGate)
    assert (last.plugin.block_size, last.plugin.normalization.rho) == (4, 0.2)
    (listed,) = chosen_gates([f"{{class_path: {path}, init_args: {{names: [a, b]}}}}"])
    assert isinstance(listed, Named)
    assert listed.name == 'Halves:names=["a", "b"]'


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("support_divergence:k=many", "has 'support_divergence:k=many': k is many, but must be an integer"),
        ("support_divergence:k=0", "has 'support_divergence:k=0': k is 0, but must be at least 1"),
        ("support_divergence:tial=drop", r"tial=drop': unknown key 'tial' .*; did you mean 'tail'\?"),
        ("support_divergence:tail=dorp", "tail is dorp, but must be one of renormalize, bucket, drop"),
        ("support_divergenc:k=8", "unknown objective 'support_divergenc'; did you mean 'support_divergence'"),
        ("support_divergence:drop", "where 'drop' is no option: give NAME, NAME:option=value"),
        ("k=8", "--objectives has 'k=8' without a name before it"),
        ("{class_path: support_divergence, k: 8}", "an entry is a name, or a section with class_path and init_args"),
        ("{k: 8", "is not YAML"),
        ("missing.yaml", "missing.yaml cannot be read"),
        ("nowhere.Objective:k=8", "--objectives has 'nowhere.Objective', but"),
        ("builtins.dict:k=8", "--objectives has 'builtins.dict', which is not an objective"),
    ],
)
def test_wrong_options_are_one_line(word: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        chosen_objectives([word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["tau=2", "statistic=rms", "normalization=none"])
def test_options_that_a_replay_varies_are_refused(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(UsageError, match=f"but a replay varies {name}: give --{name}s? instead"):
        chosen_gates([f"token:{option}"])
