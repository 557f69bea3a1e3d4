"""The folder of an evaluation's samples."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from opdlab.data import PromptDataModule
from opdlab.evaluation.evaluator import Evaluator
from opdlab.evaluation.samples import SampleFolder
from opdlab.evaluation.settings import evaluation_settings
from opdlab.policies import LanguageModel, LocalTeacher, Teacher
from opdlab.run_folder import samples_of_other_runs


def sample_folder(
    module: pl.LightningModule,
    teacher: Teacher,
    data: PromptDataModule,
    evaluator: Evaluator,
    model: LanguageModel,
    name: str,
    subfolder: str,
) -> SampleFolder | None:
    """Return the folder into which an evaluation writes its samples; None if it writes none.

    Args:
        module: the evaluating module, attached to a trainer.
        teacher: reference of the reverse KL, if that is measured.
        data: the data module with the benchmarks.
        evaluator: holds the options of evaluation and sampling.
        model: the model to sample from.
        name: name of the evaluation, such as ``val``.
        subfolder: used outside of training, if a folder holds several evaluations.
    """
    config, trainer = evaluator.config, module.trainer
    if config.samples is None or trainer.sanity_checking:
        return None
    fitting = trainer.state.fn == TrainerFn.FITTING
    subfolder = f"{name}-step-{module.global_step}" if fitting else subfolder
    settings = evaluation_settings(
        model,
        evaluator.sampler.config,
        data.benchmarks,
        teacher=teacher.model if config.reverse_kl and isinstance(teacher, LocalTeacher) else None,
        about={
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path is not None else None,
            "step": module.global_step,
        },
        evaluation={"reverse_kl": config.reverse_kl, "seed": config.seed},
        eval_batch_size=data.eval_batch_size,
        trainer={
            "precision": str(trainer.precision),
            "devices": trainer.world_size,
            "accelerator": module.device.type,
        },
    )
    samples = Path(trainer.strategy.broadcast(str(config.samples)))  # the first process knows the run's folder
    # An evaluation before training may have been stopped in another run, which then has no checkpoint to resume from.
    others = samples_of_other_runs(samples) if subfolder and not fitting else []
    return SampleFolder(
        samples / subfolder,
        settings,
        take_over=[other / subfolder for other in others],
        rank=trainer.global_rank,
        replace=bool(subfolder),  # only this run uses a subfolder
        barrier=trainer.strategy.barrier,
    )
