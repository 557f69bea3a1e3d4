"""Packs: one file replays as the run does, to the bit, without teacher, run folder and data."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.callbacks import PoolRecorder
from opdlab.cli.replay_sources import PackSource
from opdlab.data import JsonlProblems
from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.objectives import FullDivergence, Objective, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.parser_messages import options_of
from opdlab.policies import AdapterConfig, LanguageModel, LocalTeacher, RoutedTeacher, SelfTeacher
from opdlab.replay import Grid, RecordedStep, ReplayConfig, ReplayedStep, Replayer, read_record, record_folders
from opdlab.replay.fresh import Draws, Sampling, sampled_draws
from opdlab.replay.pack import PackSettings, write_pack
from opdlab.replay.plugins import Named
from opdlab.replay.steps import prepare
from opdlab.toy import ChainProblems
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
Packed = tuple[Run, list[RecordedStep], Path, dict[str, int]]
GRID = Grid(("tip",), ("signed_mean",), ("mean",), (5.0,))  # and the run's own, block32
SAMPLING = Sampling(draws=2)
LORA = AdapterConfig(r=2, target_modules=["q_proj", "lm_head"])


def recorded(make_run: MakeRun, steps: Sequence[int] = (2,), **options: Any) -> tuple[Run, list[RecordedStep]]:
    run = make_run(callbacks=(PoolRecorder(steps=list(steps)),), max_new_tokens=6, num_problems=8, **options)
    trainer = run.fit(max(steps))
    assert trainer.log_dir is not None
    return run, [read_record(folder) for folder in record_folders(Path(trainer.log_dir)).values()]


def section(plugin: Any) -> dict[str, Any]:
    path = f"{type(plugin).__module__}.{type(plugin).__name__}"
    known = set(options_of(path)) - {"normalization"}
    return {"class_path": path, "init_args": {name: each for name, each in vars(plugin).items() if name in known}}


def settings(run: Run, student: str = STUDENT) -> PackSettings:
    model = {"student": {"class_path": "opdlab.policies.LanguageModel", "init_args": {"path": student}}}
    model |= {"objective": section(run.module.objective), "gate": section(run.module.gate)}
    return PackSettings({**model, "max_tokens_per_pass": None}, 0, "cpu", None, SAMPLING)


def judging(run: Run) -> dict[str, Any]:
    """What fresh rollouts need besides, if the objective reads verdicts."""
    if not run.module.objective.needs:
        return {"prompts": (), "verifier": None}
    assert run.data.train_prompts is not None
    return {"prompts": run.data.train_prompts.prompts, "verifier": run.data.train_verifier}


def pack(run: Run, records: Sequence[RecordedStep], path: Path) -> dict[str, int]:
    prepare(run.module)
    draws = partial(sampled_draws, run.module, sampling=SAMPLING, autocast=nullcontext, **judging(run))
    return write_pack(path, run.module, settings(run), records, draws)


def replayed(path: Path, objectives: Sequence[str | Named[Objective]]) -> tuple[list[ReplayedStep], Replayer]:
    source = PackSource(path, [])
    built = source.build(SAMPLING, judged=False)
    config = ReplayConfig(draws=2)
    replayer = Replayer(built.module, GRID, config, built.autocast, (), objectives, built.draws)
    return [replayer.replay(record) for record in source.records(source.steps)], replayer


def named(**objectives: Objective) -> list[str | Named[Objective]]:
    return [Named(name, objective) for name, objective in objectives.items()]


def routed(folder: Path) -> dict[str, Any]:
    rows = [
        {"id": each.id, "problem": each.text, "answer": each.answer, "kind": ("good", "poor")[place % 2]}
        for place, each in enumerate(ChainProblems(8).problems())
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    teacher = RoutedTeacher({"good": LocalTeacher(TEACHER), "poor": STUDENT})
    return {"teacher": teacher, "data": {"train": JsonlProblems(str(path), teacher_field="kind")}}


def own_teacher(decay: float | None = None) -> dict[str, Any]:
    train = ChainProblems(8, teacher_text="{solution}\n{problem}")
    return {"teacher": SelfTeacher(decay), "data": {"train": train}}


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"objective": SampledTokenOPD(reward_weight=0.5)}, named(plain=SampledTokenOPD())),
        (
            {"objective": FullDivergence("jsd")},
            named(
                bucket=SupportDivergence("jsd", "teacher", "bucket", k=12),
                lsm=TeacherTopK(k=30),
                forward=FullDivergence("forward_kl"),
            ),
        ),
        (
            {"objective": SupportDivergence("jsd", "union", "drop", k=6)},
            named(
                teacher=TeacherTopK(k=4),
                student=SupportDivergence("reverse_kl", "student", "bucket", k=5),
                both=SupportDivergence("reverse_kl", "union", "bucket", k=3),
            ),
        ),
        ({"objective": TeacherTopK(k=8), "student": LORA}, named(small=TeacherTopK(k=4))),
        (
            {"objective": FullDivergence(), "student": LORA, "teacher": SelfTeacher},
            named(small=TeacherTopK(k=4)),
        ),
        (
            {"objective": TeacherTopK(k=8), "teacher": RoutedTeacher},
            named(small=TeacherTopK(k=4)),
        ),
        ({"objective": TeacherTopK(k=8), "accumulate": 2}, named(sampled=SampledTokenOPD())),
        ({"objective": TeacherTopK(k=8), "gate": build_gate("fire_opd")}, named(small=TeacherTopK(k=4))),
        (
            {"objective": SupportDivergence("jsd", "union", "bucket", k=6), "gate": build_gate("ta_opd")},
            named(lsm=TeacherTopK(k=4)),  # which knows no tokens of the student, so that ta_opd cannot weigh it
        ),
    ],
    ids=[
        "reward",
        "hidden states",
        "union",
        "adapter",
        "own teacher with an adapter",
        "several teachers",
        "accumulated",
        "a gate that needs the teacher's entropy",
        "a gate that another objective does not serve",
    ],
)
def test_a_pack_replays_as_its_run(
    make_run: MakeRun,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    options: dict[str, Any],
    others: Sequence[str | Named[Objective]],
) -> None:
    made = dict(options)
    if "student" in made:
        request.getfixturevalue("peft_pair")
        made["student"] = LanguageModel(STUDENT, adapter=made["student"])
    if made.get("teacher") is RoutedTeacher:
        made |= routed(tmp_path)
    elif made.get("teacher") is SelfTeacher:
        made |= own_teacher()
    steps = (2, 3) if "accumulate" in made else (2,)
    run, records = recorded(make_run, steps, **made)
    replayer = Replayer(run.module, GRID, ReplayConfig(draws=2), nullcontext, objectives=others, **judging(run))
    expected = [replayer.replay(record) for record in records]
    assert not replayer.skipped
    path = tmp_path / "pack" / "run.pack"
    sizes = pack(run, records, path)
    assert path.stat().st_size == pytest.approx(sum(sizes.values()), rel=0.05)
    assert ("head" in sizes) == isinstance(run.module.objective, FullDivergence)
    for record in records:
        shutil.rmtree(record.folder)
    found, from_pack = replayed(path, others)
    assert not from_pack.skipped
    assert found == expected  # to the bit
    assert all(len(step.others) == len(others) for step in found)
    assert len({step.replayed_loss for step in found}) == len(steps)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A run with its recorded step, the pack of it, and its sizes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    run, records = recorded(lambda **options: Run(folder, **options), (1,))
    return run, records, folder / "run.pack", pack(run, records, folder / "run.pack")


def test_trained_weights_are_not_written_twice(small: Packed) -> None:
    *_, path, sizes = small
    assert sizes["weights"] > 10 * sizes["student"]
    with zipfile.ZipFile(path) as archive:
        assert {Path(name).suffix for name in archive.namelist()} == {".json", ".safetensors"}


def test_equal_packs_are_equal_files(small: Packed, tmp_path: Path) -> None:
    run, records, path, _ = small
    pack(run, records, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_what_a_pack_lacks_is_left_out_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    run, records = recorded(make_run, objective=TeacherTopK(k=8))
    pack(run, records, tmp_path / "run.pack")
    wide: Named[Objective] = Named("wide", SupportDivergence("reverse_kl", "teacher", "renormalize", k=9))
    bucket: Named[Objective] = Named("bucket", SupportDivergence(k=4))
    (step,), replayer = replayed(tmp_path / "run.pack", [wide, bucket])
    has = "but the record has the teacher's 8 most likely tokens without the mass of all others"
    assert replayer.skipped == {
        "wide": f"needs the teacher's 9 most likely tokens, {has}",
        "bucket": f"needs the teacher's 4 most likely tokens with the mass of all others, {has}",
    }
    assert not step.others


def test_an_error_leaves_an_earlier_pack(small: Packed, tmp_path: Path) -> None:
    run, records, *_ = small
    folder = tmp_path / "packs"
    folder.mkdir()
    (folder / "run.pack").write_bytes(b"earlier")

    def draws(record: RecordedStep) -> Draws:
        raise RuntimeError("no more")

    prepare(run.module)
    with pytest.raises(RuntimeError, match="no more"):
        write_pack(folder / "run.pack", run.module, settings(run), records, draws)
    assert [path.name for path in folder.iterdir()] == ["run.pack"]
    assert (folder / "run.pack").read_bytes() == b"earlier"


def test_a_teacher_that_follows_the_student_is_refused(make_run: MakeRun) -> None:
    run = make_run(objective=SampledTokenOPD(), **own_teacher(0.9))
    with pytest.raises(UsageError, match="model.teacher is a SelfTeacher that follows the student, and records do not"):
        prepare(run.module)


@pytest.fixture(scope="module")
def small_pack(small: Packed) -> bytes:
    return small[2].read_bytes()


def rewritten(content: bytes, path: Path, **changes: Any) -> None:
    """Write a pack whose JSON has changed, with the right digests."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    text = json.dumps(json.loads(members.pop("pack.json")) | changes).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, value in {**members, "pack.json": text}.items():
            new.writestr(name, value)
        new.comment = f"opdlab replay pack 1 {hashlib.sha256(text).hexdigest()}".encode()


def changed(content: bytes, near: bytes) -> bytes:
    """Return the content with one bit changed behind the last occurrence of some bytes."""
    place = content.rindex(near) + len(near)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content, path: path.write_bytes(content[:-100]), "is cut off or damaged: copy it again"),
        (lambda content, path: path.write_bytes(content[: len(content) // 2]), "is cut off or damaged: copy it again"),
        (lambda content, path: path.write_bytes(b""), "is not a file that opdlab replay --pack has written"),
        (lambda content, path: path.write_text("text"), "is not a file that opdlab replay --pack has written"),
        (lambda content, path: zipped(path), "is a zip archive, but not a file that opdlab replay --pack has written"),
        (
            lambda content, path: path.write_bytes(content.replace(b"opdlab replay pack 1 ", b"opdlab replay pack 7 ")),
            "has format 7, but this version of opdlab reads 1: pack the run anew",
        ),
        (lambda content, path: path.write_bytes(changed(content, b"pack.json"[:4] + b" 1 ")), "another digest"),
        (lambda content, path: path.write_bytes(changed(content[:-9000], b"F32") + content[-9000:]), "damaged"),
        (lambda content, path: rewritten(content, path, steps=[{}]), "cannot be read: copy it again"),
        (lambda content, path: rewritten(content, path, members={"steps/000001/x": "0"}), "cannot be read"),
    ],
    ids=["end", "half", "empty", "text", "zip", "format", "digest", "bit", "json", "member"],
)
def test_damaged_and_foreign_files_are_refused(
    small_pack: bytes, tmp_path: Path, damage: Callable[[bytes, Path], Any], words: str
) -> None:
    path = tmp_path / "run.pack"
    damage(small_pack, path)
    with pytest.raises(UsageError, match=words) as caught:
        PackSource(path, []).records([1])
    assert str(caught.value).startswith(f"'{path}'")
    assert "\n" not in str(caught.value)


def test_other_sampling_and_keys_are_refused(small_pack: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pack"
    path.write_bytes(small_pack)
    source = PackSource(path, ["--trainer.accelerator", "cpu"])
    assert source.sampling(None, None, False) == SAMPLING
    for arguments, words in (
        ((4, None, False), "--draws is 4, but .* was packed with 2: leave it out, or pack the run anew"),
        ((None, 3, False), "--seed is 3, but .* was packed with 0"),
        ((None, None, True), "--other_prompts is given, but .* was packed without"),
    ):
        with pytest.raises(UsageError, match=words):
            source.sampling(*arguments)
    with pytest.raises(UsageError, match="--model.teacher.path is given, but .* holds its own models"):
        PackSource(path, ["--model.teacher.path=x"])
    with pytest.raises(UsageError, match="--steps has '2', which was not recorded; there are 1"):
        source.chosen(["2"])
