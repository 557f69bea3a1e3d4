"""Every field of the targets passes through the teachers that hand on those of others."""

import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.policies import LanguageModel, LocalTeacher, RoutedTeacher, SelfTeacher, TargetCache, Teacher
from opdlab.policies.served.wire import answer_bytes, pack_targets, read_targets
from opdlab.progress import Progress
from opdlab.rollouts import Rollouts
from opdlab.types import MergedTargets, Targets, TeacherRequest
from tests.policies.test_routed_teacher import some_rollouts
from tests.policies.test_target_cache import assert_equal
from tests.toy_run import STUDENT, TEACHER

NAMES = [field.name for field in fields(Targets)]
REQUESTS = [
    TeacherRequest(),
    TeacherRequest(top_k=3, behavior_top_k=2, tail=True, entropy=True),
    TeacherRequest(behavior_top_k=2),
    TeacherRequest(hidden=True),
]


def some_targets(rollouts: Rollouts) -> Targets:
    """Return targets with values of its own for each field, 0 at masked positions."""
    dtypes = {"support_ids": torch.uint8, "support_valid": torch.bool}
    sizes = {"support_ids": (2,), "support_logits": (2,), "support_valid": (2,), "hidden": (5,)}

    def value(name: str) -> Tensor:
        numbers = (rollouts.tokens.float() + zlib.crc32(name.encode()) % 97) * rollouts.mask
        size = sizes.get(name, ())
        wide = numbers.view(*numbers.shape, *[1] * len(size)).expand(*numbers.shape, *size)
        return wide.to(dtypes.get(name, torch.float32)).contiguous()

    return Targets(**{name: value(name) for name in NAMES})


class Full(Teacher):
    """A teacher that returns every field, except those left out."""

    def __init__(self, *without: str) -> None:
        local = LocalTeacher(TEACHER)
        self.tokenizer, self.vocab_size, self.without = local.tokenizer, local.vocab_size, without

    def fingerprint(self) -> str:
        return "full"

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        without: dict[str, Any] = dict.fromkeys(self.without)
        return replace(some_targets(rollouts), **without)


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(STUDENT)


def test_nothing_is_lost_on_the_way(student: LanguageModel, tmp_path: Path) -> None:
    rollouts = some_rollouts([1, 0, 0, 1])
    expected = some_targets(rollouts)
    assert all(getattr(expected, name) is not None for name in NAMES)
    routed, cached = RoutedTeacher({"one": Full(), "two": Full()}), TargetCache(Full(), str(tmp_path))
    for teacher in (routed, cached):
        teacher.bind(student)
    assert_equal(routed.score(rollouts, TeacherRequest()), expected)
    assert_equal(read_targets(pack_targets(expected), (4, 6)), expected)
    for hits in (0, 4):
        assert_equal(cached.score(rollouts, TeacherRequest()), expected)
        assert cached.metrics()["targets/cache_hits"] == hits


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_one_teacher_lacks(student: LanguageModel, name: str) -> None:
    rollouts = some_rollouts([1, 0, 0, 1])
    teacher = RoutedTeacher({"one": Full(), "two": Full(name)})
    teacher.bind(student)
    found, expected = teacher.score(rollouts, TeacherRequest()), some_targets(rollouts)
    value, theirs = getattr(found, name), getattr(expected, name)
    absent = {"support_valid": True, "support_overlap": -1.0}.get(name)
    if absent is None:  # the loss could not tell the made-up values from the teacher's
        assert value is None
    else:
        assert torch.equal(value[1:3], theirs[1:3])
        assert (value[[0, 3]] == absent).all()
    assert_equal(replace(found, **{name: theirs}), expected)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_router_returns_what_its_teachers_do(
    student: LanguageModel, tmp_path: Path, request_: TeacherRequest
) -> None:
    rollouts = replace(some_rollouts([1, 0, 0, 1]), behavior_support_ids=torch.randint(38, (4, 6, 2)).to(torch.uint8))
    own = SelfTeacher()
    own.bind(student)
    expected, of_self = (each.score(rollouts, request_) for each in (LocalTeacher(STUDENT), own))
    assert_equal(of_self, expected)
    if not request_.hidden:
        routed = RoutedTeacher({"one": STUDENT, "two": TargetCache(LocalTeacher(STUDENT), str(tmp_path))})
        routed.bind(student)
        found = routed.score(rollouts, request_)
        for name in NAMES:  # other rows in a pass round otherwise
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
        assert routed.metrics()["targets/two/cache_misses"] == 2
        none = torch.tensor([], dtype=torch.long)
        assert_equal(routed.score(rollouts.rows(none), request_), expected.rows(none))
    bytes_ = sum(value.numel() * value.element_size() for value in expected.state_dict().values() if value is not None)
    assert bytes_ <= answer_bytes(request_, 24, 4 * 64 if expected.hidden is None else 4 * expected.hidden.shape[-1])


def test_the_requests_ask_for_every_field(student: LanguageModel) -> None:
    rollouts = replace(some_rollouts([0] * 4), behavior_support_ids=torch.randint(38, (4, 6, 2)).to(torch.uint8))
    found = [LocalTeacher(STUDENT).score(rollouts, each) for each in REQUESTS]
    assert {name for name in NAMES for each in found if getattr(each, name) is not None} == set(NAMES)


def test_ids_of_other_widths_are_merged() -> None:
    merged = MergedTargets(2, 1)
    for row, dtype in enumerate((torch.uint16, torch.int32)):
        ids = torch.tensor([[[60_000 + row, 3]]]).to(dtype)
        merged.put(torch.tensor([row]), Targets(torch.zeros(1, 1), ids, torch.zeros(1, 1, 2)))
    found = merged.targets().support_ids
    assert found is not None
    assert found.tolist() == [[[60_000, 3]], [[60_001, 3]]]
