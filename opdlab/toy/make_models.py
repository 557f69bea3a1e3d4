"""Train the toy models: ``python -m opdlab.toy.make_models OUT [--world chain]``.

The teacher learns exact traces. The student is an earlier checkpoint of the same run, degraded by a few steps on
traces in which a fifth of the results is random, until its pass@1 is near :data:`STUDENT_PASS`. So distillation largely
recovers what the checkpoint knew. ``RECORD.txt`` beside the weights holds the output of the run that made them.

The student of ``strings`` is the checkpoint after 1,200 steps itself, which has not learnt the task yet: degraded, it
recovers within 16 steps of distillation (pass@1 0.98), which leaves nothing to compare.

The worlds ``chain-100k`` and ``chain-1m`` have the recipe of ``chain`` and other widths; the learning rate goes with
the inverse of the width. Their weights, and those of ``strings``, are rounded to bfloat16 before they are evaluated.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from opdlab.toy.chain import ChainProblems, chain_tokenizer
from opdlab.toy.strings import StringProblems, string_tokenizer
from opdlab.toy.task import Split, ToyProblems
from opdlab.verifiers.verifier import BoxedVerifier

BATCH_SIZE = 32
STUDENT_PASS = 0.11
"""pass@1 of the shipped chain student on 256 held-out problems, which the students of other worlds come near."""
_DEGRADED = range(16, 81, 4)  # steps after which a student is evaluated


@dataclass(frozen=True)
class World:
    """A task and the sizes of its models.

    Args:
        task: source of problems.
        tokenizer: returns the task's.
        max_new_tokens: longest answer.
        hidden_size: of the models.
        degrade: steps on faulty traces; None to try several and keep those that come nearest to the pass@1 wanted; 0
            for the checkpoint after 1,200 steps, as it is.
        last_steps: steps of the last part of the teacher's training; the student's base is 150 steps younger.
        narrow: weights are rounded to bfloat16.
    """

    task: type[ToyProblems]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    max_new_tokens: int
    hidden_size: int
    degrade: int | None = None
    last_steps: int = 650
    narrow: bool = True


WORLDS = {
    "chain": World(ChainProblems, chain_tokenizer, 176, 96, degrade=46, narrow=False),
    "chain-100k": World(ChainProblems, chain_tokenizer, 176, 56),
    "chain-1m": World(ChainProblems, chain_tokenizer, 176, 184),
    "strings": World(StringProblems, string_tokenizer, 288, 96, degrade=0, last_steps=1800),
}


def toy_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 96) -> Qwen3Config:
    """Return the configuration of the toy models: Qwen3, 2 layers, 4 heads; 281k parameters at hidden size 96."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )


def examples(
    split: Split, seed: int, error_rate: float = 0.0, task: type[ToyProblems] = ChainProblems
) -> Iterator[tuple[str, str]]:
    """Yield pairs of prompt and trace, without end."""
    rng = random.Random(seed)
    for problem in task.stream(split, seed):
        yield problem.prompt, problem.trace(error_rate, rng)


def collate(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return one right-padded batch; prompt and padding positions have label -100."""
    texts = [prompt + trace + tokenizer.eos_token for prompt, trace in pairs]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (prompt, _) in enumerate(pairs):
        labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[tuple[str, str]],
    num_steps: int,
    learning_rate: float,
    horizon: int,
    keep_step: int = 0,
) -> dict[str, torch.Tensor]:
    """Fine-tune on response tokens with AdamW: 20 warm-up steps, then a cosine schedule over ``horizon`` steps.

    Returns:
        The weights after ``keep_step`` steps; empty for 0.
    """
    kept: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, horizon, eta_min=learning_rate * 0.02)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler([warmup, cosine])
    model.train()
    for step in range(1, num_steps + 1):
        loss = model(**collate(tokenizer, list(itertools.islice(pairs, BATCH_SIZE)))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == keep_step:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if step % 50 == 0 or step == num_steps:
            print(f"  step {step:4d}  loss {loss.item():.4f}", flush=True)
    model.eval()
    return kept


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, num_problems: int = 64, n: int = 8
) -> tuple[float, float]:
    """Sample ``n`` answers to each of ``num_problems`` held-out problems and return pass@1 and pass@n."""
    torch.manual_seed(0)
    stream, num_right, num_solved = world.task.stream("held_out", 1), 0.0, 0.0
    for start in range(0, num_problems, 64):
        problems = list(itertools.islice(stream, min(64, num_problems - start)))
        inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": n}
        output = model.generate(**inputs, max_new_tokens=world.max_new_tokens, **options)
        responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        verdicts = BoxedVerifier(at_end=True).verify(responses, [p.answer for p in problems for _ in range(n)])
        correct = torch.tensor([v.correct for v in verdicts]).view(len(problems), n).float()
        num_right, num_solved = num_right + float(correct.mean(1).sum()), num_solved + float(correct.amax(1).sum())
    return num_right / num_problems, num_solved / num_problems


def main() -> None:
    """Train both models of a world and write them as Hugging Face folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for teacher/ and student/")
    parser.add_argument("--world", choices=WORLDS, default="chain")
    given = parser.parse_args()
    out, world = given.out, WORLDS[given.world]
    transformers_logging.disable_progress_bar()  # keeps the record readable
    torch.manual_seed(0)
    started = time.monotonic()
    tokenizer = world.tokenizer()
    model = Qwen3ForCausalLM(toy_config(tokenizer, world.hidden_size))
    size = sum(p.numel() for p in model.parameters())
    print(f"toy model of the world {given.world}: {size:,} parameters, torch {torch.__version__}")
    rate = 96 / world.hidden_size

    def report(name: str, num_problems: int = 64) -> float:
        pass_1, pass_8 = evaluate(model, tokenizer, world, num_problems)
        seconds = f"({time.monotonic() - started:.0f} s)"
        print(f"{name}: pass@1 {pass_1:.3f}  pass@8 {pass_8:.3f}  {seconds}", flush=True)
        return pass_1

    def judged(name: str) -> float:
        """Round the weights if they are saved in bfloat16, and report them on as many problems as a study has."""
        if world.narrow:
            model.to(torch.bfloat16).to(torch.float32)
        return report(name, 256 if world.narrow else 64)

    def save(name: str) -> None:
        (model.to(torch.bfloat16) if world.narrow else model).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        model.to(torch.float32)

    exact = examples("sft", 0, task=world.task)
    train(model, tokenizer, exact, 900, 4e-3 * rate, horizon=900)
    report("after 900 steps")
    last = world.last_steps
    train(model, tokenizer, exact, 300, 2.5e-3 * rate, horizon=last)
    report("after 1200 steps")
    if world.degrade == 0:
        early = {name: value.clone() for name, value in model.state_dict().items()}
        judged("student")
        save("student")
        model.load_state_dict(early)
    # A base that is degraded must have nearly all the teacher's knowledge, because seconds of distillation add little.
    base = train(model, tokenizer, exact, last, 2.5e-3 * rate, horizon=last, keep_step=last - 150)
    judged("teacher")
    save("teacher")
    if world.degrade == 0:
        return
    model.load_state_dict(base)
    report("base of the student")
    faulty, nearest = 5e-4 * rate, 1.0
    for steps in _DEGRADED if world.degrade is None else [world.degrade]:
        model.load_state_dict(base)
        train(model, tokenizer, examples("sft", 1, 0.2, world.task), steps, faulty, horizon=steps)
        distance = judged(f"student, {steps} steps") - STUDENT_PASS
        if abs(distance) < nearest or world.degrade is not None:
            nearest = abs(distance)
            save("student")
        if distance < 0:
            return


if __name__ == "__main__":
    main()
