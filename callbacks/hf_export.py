"""Export of the trained student as a Hugging Face folder."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from huggingface_hub import HfApi
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import GenerationConfig

from opdlab.callbacks.evaluation_table import EvaluationTable
from opdlab.data import PromptDataModule
from opdlab.errors import require
from opdlab.files import naming_full_disk, output_folder, replacing
from opdlab.model_card import TrainingRecord, describe, hub_id_error, model_card
from opdlab.module import OPDModule
from opdlab.policies import LanguageModel, SamplingConfig

CONFIG_NAME = "opdlab.yaml"


class HFExport(pl.Callback):
    """Writes the student with ``save_pretrained`` when training ends, for ``AutoModelForCausalLM`` to load.

    The folder also holds a generation config, so that ``generate`` samples as the evaluation did; a model card; and
    the run's configuration as ``opdlab.yaml`` if the command line wrote one. An evaluation after training, such as
    the one that ends ``opdlab fit``, adds its metrics to the card.

    Args:
        folder: output folder; ``student`` in the run's folder by default.
        enabled: write the folder.
        merge: write the merged model instead of only the adapter, if the student has one.
        push_to_hub: hub id of a repository to upload the folder to, for example ``me/my-student``; if it
            is missing, it is created as a private one. Needs ``hf auth login``. If the upload fails, there is a
            warning and the folder stays. The configuration is uploaded too: check it first.

    Raises:
        UsageError: ``push_to_hub`` is not a hub id.
    """

    def __init__(
        self, folder: str | None = None, enabled: bool = True, merge: bool = False, push_to_hub: str | None = None
    ) -> None:
        self.folder = folder
        self.enabled = enabled
        self.merge = merge
        self.push_to_hub = push_to_hub
        self._written: tuple[Path, TrainingRecord] | None = None
        error = None if push_to_hub is None else hub_id_error(push_to_hub)
        require(error is None, f"push_to_hub is '{push_to_hub}', which is no hub id such as me/student: {error}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise before training if the folder cannot be written, or has other files than those of a model."""
        assert isinstance(pl_module, OPDModule)
        for name in ("folder", "push_to_hub") if not self.enabled else ():
            if (value := getattr(self, name)) is not None:
                rank_zero_warn(
                    f"export.{name} is '{value}', but export.enabled is false: nothing is written or uploaded; set "
                    f"export.enabled to true, or leave export.{name} out"
                )
        if self.enabled and self.merge and not pl_module.student.has_adapter:
            rank_zero_warn("export.merge is true, but has no effect: the student has no adapter")
        if not self.enabled or self.folder is None:
            return
        folder = Path(self.folder)
        pl_module.student.check_not_origin(folder)
        # In all processes, so that none waits for one that was refused.
        output_folder(folder, "export.folder", ())
        files = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        weights = any(name.endswith(".safetensors") for name in files)
        require(
            not files or (weights and not {"config.json", "adapter_config.json"}.isdisjoint(files)),
            f"export.folder is '{folder}', which has files ({', '.join(files[:3])}{', …' * (len(files) > 3)}) but no "
            "model: give a new folder, since files of the same names would be replaced",
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder, from one process; also when a run resumes at its last step, where nothing is trained."""
        assert isinstance(pl_module, OPDModule)
        run_folder = trainer.log_dir or trainer.default_root_dir  # all processes take part, so outside the branch
        if not self.enabled:
            return
        weights = pl_module.student.whole_weights(keep=trainer.is_global_zero)  # here too
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or Path(run_folder) / "student")
        config = Path(run_folder) / "config.yaml"
        record = _training_record(trainer, pl_module, CONFIG_NAME if config.is_file() else None)
        before = _changes(folder)
        pl_module.student.save(folder, self.merge, weights)
        del weights
        write_settings(folder, pl_module.student, pl_module.evaluator.sampling, config)
        self._written = (folder, record)
        self._write_card(trainer, folder, record)
        rank_zero_info(f"student written to {folder}")
        if self.push_to_hub is not None:
            now = _changes(folder)
            self._push(folder, *(name for name in now if now[name] != before.get(name)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the metrics of an evaluation after training, which are complete once all callbacks have handled it."""
        if stage != "validate" or self._written is None:
            return
        folder, record = self._written
        self._write_card(trainer, folder, record)
        if self.push_to_hub is not None:
            self._push(folder, "README.md")

    def _write_card(self, trainer: pl.Trainer, folder: Path, record: TrainingRecord) -> None:
        name = self.push_to_hub or folder.resolve().name
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        table = next((callback for callback in callbacks if isinstance(callback, EvaluationTable)), EvaluationTable())
        results = table.cells(last=table.after_step == trainer.global_step)  # it may be of an earlier step
        write_card(folder, name, replace(record, results=results))

    def _push(self, folder: Path, *files: str) -> None:
        assert self.push_to_hub is not None
        try:
            hub = HfApi()
            hub.create_repo(repo_id=self.push_to_hub, private=True, exist_ok=True)
            hub.upload_folder(
                repo_id=self.push_to_hub,
                folder_path=folder,
                allow_patterns=list(files),
                commit_message="Upload what opdlab distilled",
            )
        except Exception as error:  # any error: training is finished and must not be reported as failed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rank_zero_warn(
                f"push_to_hub '{self.push_to_hub}' failed, but {folder} is complete; to try again: "
                f"hf upload {self.push_to_hub} {folder} ({reason})"
            )


def _changes(folder: Path) -> dict[str, int]:
    """Return the files in a folder, and when they were changed: others that are there are not uploaded."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*")) if path.is_file()}


def write_settings(folder: Path, student: LanguageModel, sampling: SamplingConfig, config: Path) -> None:
    """Write the generation config into a student's folder, and the run's configuration if there is one.

    Args:
        folder: with the weights.
        student: the model.
        sampling: settings of the evaluation's sampling.
        config: path of the run's configuration.

    Raises:
        FullDiskError: the disk is full.
    """
    with naming_full_disk(folder):
        generation_config(student, sampling).save_pretrained(folder)
        if config.is_file():
            shutil.copyfile(config, folder / CONFIG_NAME)


def write_card(folder: Path, name: str, record: TrainingRecord) -> None:
    """Write the model card into a student's folder.

    Args:
        folder: of the student.
        name: of the model.
        record: content of the card.
    """
    with replacing(folder / "README.md") as file:
        file.write(model_card(name, record).content.encode("utf-8", "replace"))


def generation_config(model: LanguageModel, sampling: SamplingConfig) -> GenerationConfig:
    """Return the generation config for opdlab's sampling: its stop tokens, temperature and top-p, and nothing else.

    Args:
        model: its stop and padding tokens are used.
        sampling: settings of the evaluation's sampling.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,  # the default of transformers is 50
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=model.stop_ids,
        pad_token_id=model.tokenizer.pad_token_id,
    )


def card_settings(model: Any, answers: SamplingConfig) -> dict[str, str]:
    """Return the settings of the loss and of sampling by their name on the model card.

    Args:
        model: an :class:`OPDModule`, or another object with ``objective``, ``gate``, ``reduction`` and ``sampling``.
        answers: settings of the evaluation's sampling.
    """
    return {
        "objective": describe(model.objective),
        "gate": describe(model.gate),
        "reduction": model.reduction,
        "rollouts": describe(model.sampling),
        "answers": describe(answers),
    }


def _training_record(trainer: pl.Trainer, module: OPDModule, config: str | None) -> TrainingRecord:
    """Return the model card's facts of a run that has just ended.

    Args:
        trainer: of the run.
        module: the trained module.
        config: name of the configuration file beside the card, or None.
    """
    data = getattr(trainer, "datamodule", None)
    teacher = getattr(module.teacher, "model", None)
    settings = {
        **card_settings(module, module.evaluator.sampling),
        "optimizer steps": str(trainer.global_step),
        "optimizer": ", ".join(f"{type(each).__name__}(lr={each.defaults.get('lr')})" for each in trainer.optimizers),
        "precision": str(trainer.precision),
    }
    return TrainingRecord(
        student=module.student.path,
        teacher=teacher.path if isinstance(teacher, LanguageModel) else type(module.teacher).__name__,
        data=data.train_source.name if isinstance(data, PromptDataModule) else "unknown",
        settings=settings | ({"reuse": describe(data.reuse)} if isinstance(data, PromptDataModule) else {}),
        config=config,
    )
