"""TRL's side of ``step.py``: ``DistillationTrainer``, with as many steps of as many rollouts, all of them fresh."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from step_common import BETAS, CLIP_NORM, WARM_UP_STEPS, WEIGHT_DECAY, Run
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]


class Observer(TrainerCallback):  # type: ignore[misc]
    """Evaluates after each step."""

    def __init__(self, run: Run, student: Any, tokenizer: Any) -> None:
        self.run, self.student, self.tokenizer = run, student, tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of the setup."""
        self.run.clock.begin_steps()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step and evaluate."""
        self.run.clock.end_steps()
        if self.run.after_step(state.global_step, self.student, self.tokenizer):
            control.should_training_stop = True


def train(run: Run) -> dict[str, Any]:
    """Train, and return the measured run.

    The teacher's time covers only its layers. Its head runs inside the loss, which counts as update, like
    all other work.
    """
    case = run.task.sizes
    student = AutoModelForCausalLM.from_pretrained(run.task.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(run.task.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.task.student, padding_side="left")
    student.generate = run.parts.around("sample", student.generate)
    teacher.base_model.forward = run.parts.around("teacher", teacher.base_model.forward)
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=run.task.steps,
            per_device_train_batch_size=case.batch_size,
            gradient_accumulation_steps=1,
            max_completion_length=case.max_new_tokens,
            temperature=1.0,
            beta=1.0,  # reverse KL
            learning_rate=case.learning_rate,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP_NORM,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARM_UP_STEPS,
            # TRL's defaults are for large models on GPUs; these settings are faster here.
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_steps=run.task.log_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=run.task.seed,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": case.prompts()}),
            processing_class=tokenizer,
            callbacks=[Observer(run, student, tokenizer)],
        )
        run.clock.start()
        trainer.train()
        run.clock.stop()
    steps = trainer.state.global_step
    lengths = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    run.tokens = dict.fromkeys(run.tokens, steps * case.batch_size * sum(lengths) / len(lengths))
    run.parts.add("update", run.clock.steps_wall - sum(run.parts.seconds.values()))
    return run.result(steps)
