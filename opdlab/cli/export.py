"""``opdlab export``: write the student of a run's checkpoint as a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from jsonargparse import Namespace
from torch import Tensor

from opdlab.callbacks.evaluation_table import EvaluationTable
from opdlab.callbacks.hf_export import CONFIG_NAME, card_settings, write_card, write_settings
from opdlab.checkpoint_choice import BEST, LAST, choose_checkpoint, student_weights
from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.cli.parsing import build_sections, parse_fit
from opdlab.data import ReuseConfig
from opdlab.errors import UsageError, require
from opdlab.evaluation.benchmark_metrics import TEACHER, figures_of
from opdlab.model_card import TrainingRecord, describe
from opdlab.policies import LanguageModel, SamplingConfig
from opdlab.run_folder import RunFolder, read_config, read_metrics


def parser() -> PlainParser:
    """Return the parser of ``opdlab export``."""
    made = PlainParser(
        prog="opdlab export",
        description=f"{COMMANDS['export'].summary} The folder has weights, tokenizer, generation config, model card "
        "and the run's configuration. The model is built from the run's configuration; nothing in a checkpoint names a "
        "class.",
        allow_abbrev=False,
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder, such as runs/quickstart/version_0")
    made.add_argument(
        "--checkpoint",
        default=LAST,
        help=f"{LAST} (the default), {BEST}, which needs a run with checkpoint.monitor and checkpoint.mode, or a file",
    )
    made.add_argument("--merge", action="store_true", help="write the merged model of a student with an adapter")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder; RUN/student-CHECKPOINT by default")
    return made


def export(arguments: Sequence[str]) -> int:
    """Run ``opdlab export``, and return the exit code.

    Args:
        arguments: arguments after ``export``.

    Raises:
        UsageError: the folder is not a run's, there is no such checkpoint, or the output exists.
    """
    require(bool(arguments), "give a run's folder, such as runs/quickstart/version_0; see opdlab export --help")
    options = parser().parse_args(arguments)
    folder = RunFolder.open(options.run)
    if options.out is not None:
        _check_new(options.out)
    read_config(folder.config)  # refuses one that is cut off
    config = parse_fit(["-c", str(folder.config), "--ckpt_path", "null"])
    path, step = choose_checkpoint(folder, options.checkpoint, config.checkpoint.monitor, config.checkpoint.mode)
    out = options.out or folder.path / f"student-{path.stem}"
    _check_new(out)
    weights = student_weights(path)
    built = build_sections({name: config.model[name] for name in ("student", "objective", "gate")})
    student: LanguageModel = built.student
    _load(student, weights, path)
    answers = SamplingConfig(**config.model.eval_sampling.as_dict())
    parts = SimpleNamespace(
        objective=built.objective,
        gate=built.gate,
        reduction=config.model.reduction,
        sampling=SamplingConfig(**config.model.sampling.as_dict()),
    )
    settings = {**card_settings(parts, answers), **_plain_settings(config, step)}
    record = _record(config, settings, _results(folder, step))  # it may be refused
    try:
        student.save(out, options.merge)
        write_settings(out, student, answers, folder.config)
        write_card(out, out.resolve().name, record)
    except OSError as error:
        raise UsageError(f"--out '{out}' cannot be written ({error.strerror}): give another folder") from error
    if options.merge and not student.has_adapter:
        print("--merge has no effect: the student has no adapter")
    kind = "adapter" if student.has_adapter and not options.merge else "student"
    print(f"{kind} after {step} steps, from {path}", f"written to {out}", sep="\n")
    return 0


def _check_new(out: Path) -> None:
    require(not out.exists() and not out.is_symlink(), f"--out '{out}' exists: give another folder, or delete it")


def _load(student: LanguageModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a checkpoint's weights into the student of the run's configuration."""
    try:
        student.load_state_dict(dict(weights))
    except RuntimeError as error:  # of names and shapes
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"'{path}' does not fit the student of the run's configuration: give a checkpoint of this run ({reason})"
        ) from error


def _plain_settings(config: Namespace, step: int) -> dict[str, str]:
    optimizer = config.model.optimizer
    name, lr = optimizer.class_path.rpartition(".")[2], optimizer.init_args.get("lr")
    return {
        "optimizer steps": str(step),
        "optimizer": name if lr is None else f"{name}(lr={lr})",
        "precision": str(config.trainer.precision or "32-true"),
        "reuse": describe(ReuseConfig(**config.data.reuse.as_dict())),
    }


def _record(config: Namespace, settings: Mapping[str, str], results: Mapping[str, Mapping[str, str]]) -> TrainingRecord:
    """Return the content of the model card; teacher and data are named as the configuration names them."""
    named = {}
    for key in ("model.student", "model.teacher", "data.train"):
        section = config[key]
        path = (section.get("init_args") or {}).get("path")
        named[key] = str(path or section.class_path.rpartition(".")[2])
    return TrainingRecord(
        named["model.student"], named["model.teacher"], named["data.train"], settings, results, CONFIG_NAME
    )


def _results(folder: RunFolder, step: int) -> dict[str, dict[str, str]]:
    """Return the evaluations before training, of the checkpoint's step and of teachers, as cells of a table."""
    rows = read_metrics(folder.metrics)
    table = EvaluationTable()
    table.before, table.after = (figures_of(rows.get(each, {}), "val/") for each in (0, step))
    for row in rows.values():
        for prefix in {name.partition("/")[0] for name in row if name.startswith(TEACHER)}:
            table.teachers[prefix] = figures_of(row, f"{prefix}/")
    if not table.after:
        return {}
    return {f"step {step}" if name == "after" else name: cells for name, cells in table.cells().items()}
