"""Targets on disk: found again by everything they depend on, and by nothing less."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.errors import FullDiskError, UsageError
from opdlab.policies import (
    LanguageModel,
    LocalTeacher,
    NoTeacher,
    RoutedTeacher,
    SelfTeacher,
    TargetCache,
    TeacherRequest,
)
from opdlab.rollouts import Rollouts, Targets
from tests.children import run_child
from tests.policies.test_routed_teacher import some_rollouts
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
REQUEST = TeacherRequest(top_k=3, entropy=True)


def cache(folder: Path, path: str = TEACHER, **options: Any) -> TargetCache:
    made = TargetCache(LocalTeacher(path, **options), str(folder))
    made.bind(LanguageModel(STUDENT))
    return made


def rollouts() -> Rollouts:
    return replace(some_rollouts([0] * 4), teacher_ids=None)


def hits(teacher: TargetCache) -> tuple[float, float]:
    found = teacher.metrics()
    return found["targets/cache_hits"], found["targets/cache_misses"]


def assert_equal(one: Targets, other: Targets) -> None:
    for field in fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None) == (second is None), field.name
        assert first is None or (first.dtype == second.dtype and torch.equal(first, second)), field.name


def test_targets_from_disk_are_those_of_the_teacher(tmp_path: Path) -> None:
    first = cache(tmp_path, offload=True)
    assert first.offload
    scored = first.score(rollouts(), REQUEST)
    assert hits(first) == (0, 4)
    assert_equal(scored, LocalTeacher(TEACHER).score(rollouts(), REQUEST))
    second = cache(tmp_path, batch_size=1)
    assert_equal(second.score(rollouts(), REQUEST), scored)
    assert hits(second) == (4, 0)
    # Other padding, another order, and some new rows.
    order = torch.tensor([2, 0])
    wider = rollouts().rows(order)
    wider = replace(
        wider,
        tokens=torch.cat([wider.tokens, wider.tokens * 0], 1),
        mask=torch.cat([wider.mask, wider.mask & False], 1),
    )
    found = second.score(wider, REQUEST)
    assert hits(second) == (2, 0)
    assert torch.equal(found.logprobs[:, :6], scored.logprobs[order])
    assert not found.logprobs[:, 6:].any()
    assert not list(tmp_path.rglob("*.partial"))


CHANGES: dict[str, Callable[[Rollouts], Rollouts]] = {
    "prompt": lambda r: replace(r, prompt_tokens=r.prompt_tokens + 1),
    "shorter prompt": lambda r: replace(r, prompt_mask=r.prompt_mask & torch.tensor([False, True])),
    "teacher's prompt": lambda r: replace(
        r, teacher_prompt_tokens=r.prompt_tokens + 1, teacher_prompt_mask=r.prompt_mask
    ),
    "response": lambda r: replace(r, tokens=r.tokens.roll(1, 0)),
    "mask": lambda r: replace(r, mask=r.mask & (torch.arange(6) > 0)),
    "temperature": lambda r: replace(r, temperature=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_targets_depend_on_is_in_their_key(tmp_path: Path, change: str) -> None:
    teacher = cache(tmp_path)
    teacher.score(rollouts(), REQUEST)
    changed = CHANGES[change](rollouts())
    targets = teacher.score(changed, REQUEST)
    assert hits(teacher) == (0, 4)
    assert_equal(targets, LocalTeacher(TEACHER).score(changed, REQUEST))


def test_other_teachers_and_requests_have_their_own_targets(tmp_path: Path) -> None:
    cache(tmp_path).score(rollouts(), REQUEST)
    for teacher in (cache(tmp_path, STUDENT), cache(tmp_path, dtype="bfloat16")):
        teacher.score(rollouts(), REQUEST)
        assert hits(teacher) == (0, 4)
    teacher = cache(tmp_path)
    for request in (TeacherRequest(top_k=4, entropy=True), TeacherRequest(top_k=3), TeacherRequest(vocab_size=37)):
        teacher.score(rollouts(), request)
        assert hits(teacher) == (0, 4)
    teacher.score(rollouts(), replace(REQUEST, logprobs=False))  # all that may be missing is there
    assert hits(teacher) == (4, 0)


def test_parts_of_a_key_have_their_lengths(tmp_path: Path) -> None:
    # Without them, these would be one sequence of numbers: 5 7 8 | 9 1 | 1 1 and 5 | 7 8 9 | 1 1 1.
    teacher, zeros, counted = cache(tmp_path), torch.zeros(1, dtype=torch.long), torch.ones(1, 3).bool()
    for prompt, response in (([5, 7, 8], [9, 1]), ([5], [7, 8, 9])):
        parts = torch.tensor([prompt]), counted[:, : len(prompt)], torch.tensor([response]), counted[:, : len(response)]
        teacher.score(Rollouts(*parts, torch.zeros(1, len(response)), *5 * (zeros,)), REQUEST)
        assert hits(teacher) == (0, 1)


def test_the_teacher_of_a_rollout_is_in_its_key(tmp_path: Path) -> None:
    teacher = TargetCache(RoutedTeacher({"good": TEACHER, "poor": STUDENT}), str(tmp_path))
    teacher.bind(LanguageModel(STUDENT))
    teacher.score(some_rollouts([0, 1, 0, 1]), REQUEST)
    targets = teacher.score(some_rollouts([0, 1, 1, 0]), REQUEST)
    assert hits(teacher) == (2, 2)
    assert teacher.names == ("good", "poor")
    assert teacher.metrics()["targets/good/share"] == teacher.metrics()["targets/poor/share"] == 0.5  # of the others
    other = LocalTeacher(STUDENT).score(rollouts().rows(torch.tensor([2])), REQUEST)
    assert torch.equal(targets.logprobs[2, :1], other.logprobs[0, :1])


class WithoutMass(LocalTeacher):
    """Knows probabilities only relative to others of the support."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Any = None) -> Targets:
        targets = super().score(rollouts, request, progress)
        return replace(targets, logprobs=targets.logprobs * torch.nan, support_mass=None)


def test_what_one_teacher_cannot_compute_is_left_out(tmp_path: Path) -> None:
    routed = RoutedTeacher({"good": LocalTeacher(TEACHER), "poor": WithoutMass(STUDENT)})
    teacher = TargetCache(routed, str(tmp_path))
    teacher.bind(LanguageModel(STUDENT))
    assert teacher.score(some_rollouts([0] * 4), REQUEST).known_logprobs is not None
    for ids, found in (([0, 0, 1, 1], (2, 2)), ([0, 0, 1, 1], (4, 0))):
        targets = teacher.score(some_rollouts(ids), REQUEST)
        assert hits(teacher) == found
        assert (targets.support_mass, targets.known_logprobs) == (None, None)
        assert targets.support_logits is not None


class Failing(LocalTeacher):
    """Fails after its first part, as servers do."""

    def score_in_parts(
        self, rollouts: Rollouts, request: TeacherRequest, progress: Any = None
    ) -> Iterator[tuple[torch.Tensor, Targets]]:
        rows = torch.tensor([3, 1])
        yield rows, self.score(rollouts.rows(rows), request)
        raise UsageError("no server answers")


def test_what_is_scored_before_a_failure_is_kept(tmp_path: Path) -> None:
    teacher = TargetCache(Failing(TEACHER, batch_size=1), str(tmp_path))
    teacher.bind(LanguageModel(STUDENT))
    with pytest.raises(UsageError, match="no server answers"):
        teacher.score(rollouts(), REQUEST)
    again = cache(tmp_path, batch_size=1)  # a row's numbers do not depend on the others
    assert_equal(again.score(rollouts(), REQUEST), LocalTeacher(TEACHER, batch_size=1).score(rollouts(), REQUEST))
    assert hits(again) == (2, 2)


def test_a_full_disk_ends_the_run_and_keeps_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, left, fsync = cache(tmp_path, batch_size=1), iter(range(2)), os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FullDiskError, match=r"/.*\.safetensors cannot be written, because the disk is full"):
            teacher.score(rollouts(), REQUEST)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    assert_equal(teacher.score(rollouts(), REQUEST), LocalTeacher(TEACHER, batch_size=1).score(rollouts(), REQUEST))
    assert hits(teacher) == (2, 2)


def test_the_snapshots_tokens_are_in_the_key(tmp_path: Path) -> None:
    teacher, request = cache(tmp_path), TeacherRequest(behavior_top_k=2, tail=True)
    for ids in (torch.tensor([3, 4]), torch.tensor([3, 5])):
        given = replace(rollouts(), behavior_support_ids=ids.expand(4, 6, 2).to(torch.uint8))
        targets = teacher.score(given, request)
        assert hits(teacher) == (0, 4)
        assert_equal(targets, LocalTeacher(TEACHER).score(given, request))


class Older(LocalTeacher):
    """Returns targets as they were before the overlap was one of their fields."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Any = None) -> Targets:
        return replace(super().score(rollouts, request, progress), support_overlap=None)


def test_older_targets_lack_the_overlap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor([3, 4]).expand(4, 6, 2).to(torch.uint8)
    given, request = replace(rollouts(), behavior_support_ids=ids), TeacherRequest(behavior_top_k=2, tail=True)
    older = TargetCache(Older(TEACHER, batch_size=1), str(tmp_path))
    older.bind(LanguageModel(STUDENT))
    assert older.score(given.rows(torch.tensor([1, 2])), request).support_overlap is None
    newer, expected = cache(tmp_path, batch_size=1), LocalTeacher(TEACHER, batch_size=1).score(given, request)
    for found in ((2, 2), (4, 0)):
        targets = newer.score(given, request)
        assert hits(newer) == found
        assert targets.support_overlap is not None
        assert expected.support_overlap is not None
        assert torch.equal(targets.support_overlap[[0, 3]], expected.support_overlap[[0, 3]])
        assert (targets.support_overlap[[1, 2]] == -1).all()
        assert_equal(replace(targets, support_overlap=None), replace(expected, support_overlap=None))
    assert caplog.text.count("lack the overlap of supports") == 1


def test_a_state_that_changes_the_weights_changes_the_keys(tmp_path: Path) -> None:
    teacher = TargetCache(SelfTeacher(), str(tmp_path))
    teacher.bind(LanguageModel(STUDENT))
    before = teacher.score(rollouts(), REQUEST)
    teacher.load_state_dict({name: weight * 1.1 for name, weight in teacher.state_dict().items()})
    after = teacher.score(rollouts(), REQUEST)
    assert hits(teacher) == (0, 4)
    assert not torch.equal(before.logprobs, after.logprobs)


def test_the_teacher_is_told_of_each_step(tmp_path: Path) -> None:
    told: list[LanguageModel] = []

    class Told(LocalTeacher):
        def after_step(self, student: LanguageModel) -> None:
            told.append(student)

    student = LanguageModel(STUDENT)
    TargetCache(Told(TEACHER), str(tmp_path)).after_step(student)
    assert told == [student]


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"model\.teacher\.folder is '.*/file/targets', which cannot be written \(Not a"
    ):
        cache(tmp_path / "file" / "targets")
    teacher = cache(tmp_path / "targets")
    (tmp_path / "targets").rmdir()
    (tmp_path / "targets").touch()
    with pytest.raises(UsageError, match=r"model\.teacher\.folder is '.*/targets', which cannot be written"):
        teacher.score(rollouts(), REQUEST)


def test_a_line_says_how_large_the_folder_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).score(rollouts(), REQUEST)
    assert "targets on disk" not in caplog.text
    cache(tmp_path)
    assert f"targets on disk: 4 rollouts, 0.0 MiB in {tmp_path}; nothing there is deleted" in caplog.text


def test_many_files_are_not_all_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(32):
        (tmp_path / f"{part:02x}").mkdir()
        for number in range(100):
            (tmp_path / f"{part:02x}" / f"{number}.safetensors").write_bytes(bytes(4096))
    read: list[str] = []
    scan = os.scandir

    def watched(path: Any) -> Any:
        read.append(str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", watched)  # shows in no result
    cache(tmp_path)
    assert f"targets on disk: about 3,200 rollouts, 12.5 MiB in {tmp_path}; nothing" in caplog.text
    assert sum(str(tmp_path) in path for path in read) == 11  # the folder, and ten of those in it


@pytest.mark.parametrize("content", [b"", b"cut off", None, "flipped"])
def test_damaged_files_are_scored_again(tmp_path: Path, content: bytes | str | None) -> None:
    teacher = cache(tmp_path, batch_size=1)  # a row's numbers do not depend on the others
    scored = teacher.score(rollouts(), REQUEST)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    whole = files[0].read_bytes()
    if isinstance(content, str):
        content = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]  # a bit of a number
    files[0].write_bytes(whole[:-3] if content is None else content)
    assert_equal(teacher.score(rollouts(), REQUEST), scored)
    assert hits(teacher) == (3, 1)
    assert_equal(teacher.score(rollouts(), REQUEST), scored)
    assert hits(teacher) == (4, 0)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.policies.test_target_cache import REQUEST, cache, rollouts\n"
        "teacher = cache(Path(sys.argv[1]))\nfor _ in range(5):\n"
        "    for file in Path(sys.argv[1]).rglob('*.safetensors'):\n        file.unlink(missing_ok=True)\n"
        "    teacher.score(rollouts(), REQUEST)\n"
    )
    # Both write and remove the same four files all the time, and may score them in other batches.
    command = [sys.executable, "-c", code, str(tmp_path)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: run_child(command, cwd=Path(__file__).parents[2], check=True), range(2)))
    found, scored = cache(tmp_path).score(rollouts(), REQUEST), LocalTeacher(TEACHER).score(rollouts(), REQUEST)
    for name in ("logprobs", "support_logits", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(scored, name), rtol=0, atol=1e-4)


def test_a_run_from_the_cache_is_the_same_run(make_run: MakeRun, tmp_path: Path) -> None:
    def run() -> Run:
        made = make_run(teacher=TargetCache(LocalTeacher(TEACHER), str(tmp_path / "cache")), max_new_tokens=12)
        made.fit(5)
        return made

    plain = make_run(max_new_tokens=12)
    plain.fit(5)
    first, second = run(), run()
    assert first.recorder.losses == second.recorder.losses == plain.recorder.losses
    assert isinstance(second.module.teacher, TargetCache)
    assert hits(second.module.teacher) == (16, 0)
    assert second.recorder.steps[1]["targets/cache_hits"] == 16
    assert first.recorder.steps[1]["targets/cache_misses"] == 16


def test_teachers_that_change_and_other_wrong_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SelfTeacher that follows the student's weights, so its targets"):
        TargetCache(SelfTeacher(decay=0.9), str(tmp_path))
    with pytest.raises(UsageError, match="folder is empty, but must be the folder of the targets"):
        TargetCache(SelfTeacher(), "")
    frozen = TargetCache(SelfTeacher(), str(tmp_path))
    frozen.bind(LanguageModel(STUDENT))
    frozen.score(rollouts(), REQUEST)
    assert hits(frozen) == (0, 4)
    with pytest.raises(UsageError, match="NoTeacher, whose targets cannot be kept, because its weights are unknown"):
        NoTeacher().fingerprint()
