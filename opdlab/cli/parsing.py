"""The parser of ``fit``, ``validate``, ``test`` and ``estimate``, which studies use too."""

import functools
import inspect
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import DefaultHelpFormatter, Namespace, dict_to_namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from opdlab.callbacks import RunCheckpoint
from opdlab.checkpoints import find_checkpoint
from opdlab.cli.building import build
from opdlab.cli.checks import CALLBACKS, check_config
from opdlab.cli.commands import COMMANDS
from opdlab.cli.config_files import CONFIG_MODE, ConfigFile, expand_names, explainer
from opdlab.cli.plugins import described
from opdlab.cli.shipped import shipped_configs
from opdlab.data import PromptDataModule
from opdlab.errors import UsageError, first_line, require, user_code
from opdlab.gating import gate_registry
from opdlab.module import OPDModule
from opdlab.objectives.base import objective_registry
from opdlab.seeds import run_seed

RUN_KEYS = ("ckpt_path", "weights_only")
"""Keys that are passed to the method of the trainer."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formatter that keeps the line breaks of descriptions, and shows types and defaults like jsonargparse."""


@functools.cache
def fit_parser(command: str = "fit") -> LightningArgumentParser:
    """Return the parser of a command that takes a whole configuration: fit, validate, test or estimate.

    The parser is built once, because a study parses every variant with it.
    """
    parser = LightningArgumentParser(
        prog=f"opdlab {command}",
        description=COMMANDS[command].summary,
        epilog=f"registered gates (--model.gate NAME; --model.gate.help NAME shows the options of one):\n"
        f"{described(gate_registry())}\n\n"
        f"registered objectives (--model.objective NAME; --model.objective.help NAME shows the options of one):\n"
        f"{described(objective_registry())}",
        formatter_class=_HelpFormatter,
        parser_mode=CONFIG_MODE,
        exit_on_error=False,
        allow_abbrev=False,
        dump_header=[f"lightning.pytorch=={lightning.__version__}"],
    )
    parser.add_argument(
        "-c", "--config", action=ConfigFile, help="A configuration file, or the name of a shipped one; later ones win."
    )
    parser.add_argument(
        "--seed_everything",
        type=bool | int,
        default=0,
        help="Seed of all generators, set before anything is built; true takes a random one. data.seed and "
        "model.evaluation.seed follow it unless they are given.",
    )
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(OPDModule, "model")
    parser.add_lightning_class_args(PromptDataModule, "data")
    for section, callback in CALLBACKS.items():  # each callback has its own section of the configuration
        parser.add_lightning_class_args(callback, section)
    parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
    parser.add_argument(
        "--check_memory", type=bool, default=True, help="Refuse models whose weights alone exceed the device."
    )
    parser.add_argument("--save_pools", type=bool, default=False, help="Record steps for `opdlab replay`.")
    parser.link_arguments("save_pools", "pool_recorder.enabled")
    parser.set_defaults(
        {
            "trainer.max_epochs": -1,
            "checkpoint.every_n_train_steps": 50,
            "checkpoint.filename": "step-{step}",
            "checkpoint.auto_insert_metric_name": False,
        }
    )
    method = command if command in ("validate", "test") else "fit"
    skip = set(inspect.signature(getattr(Trainer, method)).parameters) - set(RUN_KEYS)
    parser.add_method_arguments(Trainer, method, skip=skip)
    return parser


def parse_fit(arguments: Sequence[str], command: str = "fit") -> Namespace:
    """Return the configuration of ``opdlab COMMAND ARGUMENTS``, after all checks that need no model.

    Args:
        arguments: arguments after the name of the command.
        command: fit, validate, test or estimate.

    Raises:
        UsageError: a key is unknown, a value is invalid, or values are inconsistent.

    Example:
        >>> parse_fit(["-c", "quickstart", "--trainer.max_steps", "3"]).trainer.max_steps
        3
    """
    parser = fit_parser(command)
    try:
        with user_code("importing a class of the configuration"):
            config = parser.parse_args(expand_names(arguments))
    except ArgumentError as error:
        raise UsageError(_explained(parser, error, arguments)) from error
    finally:
        vars(parser).pop("print_config", None)  # left by --print_config before a mistake
    config.seed_everything = run_seed(config.seed_everything)
    config.trainer.default_root_dir = str(config.trainer.default_root_dir or "runs")
    if config.ckpt_path is not None:
        root = Path(config.trainer.default_root_dir)
        config.ckpt_path = str(find_checkpoint(config.ckpt_path, root, resume=command == "fit"))
    check_config(parser, config)
    return config


def check_length(config: Namespace) -> None:
    """Refuse a run without an end.

    Raises:
        UsageError: neither steps, epochs nor a time are set.
    """
    trainer = config.trainer
    ends = trainer.max_steps != -1 or trainer.max_epochs not in (None, -1) or trainer.max_time is not None
    require(
        ends,
        "trainer.max_steps is -1, so the run would never end: give the number of optimizer steps, for example "
        "--trainer.max_steps 200, or trainer.max_time",
    )


def _explained(parser: LightningArgumentParser, error: ArgumentError, arguments: Sequence[str]) -> str:
    """Return one line about an error of the parser."""
    if match := re.match(r"unrecognized arguments: (?!-)(\S+)", str(error)):
        known = match[1] in shipped_configs() or match[1].endswith((".yaml", ".yml"))
        hint = f"; did you mean -c {match[1]}?" if known else f"; see {parser.prog} --help"
        return f"'{match[1]}' is one argument too many{hint}"
    if match := re.match(r"argument (\S+): expected one argument", str(error)):
        named = match[1].rpartition("/")[2]  # of a key inside a section, the parser names the section alone
        followed = zip(arguments, [*arguments[1:], "--"], strict=True)
        inside = (word for word, after in followed if word.startswith(f"{named}.") and after.startswith("--"))
        return f"{next(inside, named)} has no value: give one after it"
    return explainer(parser)(error)


def build_sections(sections: Mapping[str, Any]) -> Any:
    """Return instances of the classes that sections of ``model`` describe, and build nothing else.

    Args:
        sections: by their name, such as ``student``.

    Raises:
        UsageError: one of them cannot be built.
    """
    described = Namespace()  # type: ignore[no-untyped-call]
    for key, section in sections.items():
        plain = section if isinstance(section, Namespace) else dict_to_namespace(section)
        described[f"model.{key}"] = plain
    try:
        with user_code("importing a class of the run"):
            return build(fit_parser(), described, groups=False).model
    except ValueError as error:  # the base class is checked before anything is built
        raise UsageError(f"the run's {' and '.join(sections)} cannot be built: {first_line(error)}") from error
