"""Train the toy teacher and student of the quickstart: ``python -m opdlab.toy.make_models OUT``.

The teacher learns exact traces. The student is an earlier checkpoint of the same run, degraded by a few steps on
traces in which a fifth of the results is random. So distillation largely recovers what the checkpoint knew.
``opdlab/toy/models/RECORD.txt`` holds the output of the run that made the shipped weights.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from opdlab.toy.chain import Split, chain_problems, chain_tokenizer
from opdlab.verifiers.verifier import BoxedVerifier

BATCH_SIZE = 32


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


def examples(split: Split, seed: int, error_rate: float = 0.0) -> Iterator[tuple[str, str]]:
    """Yield pairs of prompt and trace, without end."""
    rng = random.Random(seed)
    for problem in chain_problems(split, seed):
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
def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_problems: int = 64, n: int = 8) -> str:
    """Sample ``n`` answers to each of ``num_problems`` held-out problems and return a line with pass@1 and pass@8."""
    problems = list(itertools.islice(chain_problems("held_out", seed=1), num_problems))
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=176, num_return_sequences=n
    )
    responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    verdicts = BoxedVerifier(at_end=True).verify(responses, [p.answer for p in problems for _ in range(n)])
    correct = torch.tensor([v.correct for v in verdicts]).view(num_problems, n).float()
    return f"pass@1 {correct.mean():.3f}  pass@{n} {correct.amax(1).mean():.3f}"


def main() -> None:
    """Train both models and write them as Hugging Face folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for teacher/ and student/")
    out = parser.parse_args().out
    transformers_logging.disable_progress_bar()  # keeps the record readable
    torch.manual_seed(0)
    started = time.monotonic()
    tokenizer = chain_tokenizer()
    model = Qwen3ForCausalLM(toy_config(tokenizer))
    print(f"toy model: {sum(p.numel() for p in model.parameters()):,} parameters, torch {torch.__version__}")

    def report(name: str) -> None:
        print(f"{name}: {evaluate(model, tokenizer)}  ({time.monotonic() - started:.0f} s)", flush=True)

    def save(name: str) -> None:
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)

    exact = examples("sft", seed=0)
    train(model, tokenizer, exact, 900, 4e-3, horizon=900)
    report("after 900 steps")
    train(model, tokenizer, exact, 300, 2.5e-3, horizon=650)
    report("after 1200 steps")
    # The student's base must have nearly all the teacher's knowledge, because seconds of distillation add little.
    base = train(model, tokenizer, exact, 650, 2.5e-3, horizon=650, keep_step=500)
    report("teacher")
    save("teacher")
    model.load_state_dict(base)
    report("base of the student")
    train(model, tokenizer, examples("sft", seed=1, error_rate=0.2), 46, 5e-4, horizon=46)
    report("student")
    save("student")


if __name__ == "__main__":
    main()
