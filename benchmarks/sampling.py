"""Time of sampling: opdlab's loop against transformers' own, and against transformers' alternatives.

- ``generate``: transformers' loop; each prompt has a row per response, a batch runs until its longest row is done;
- ``chunks``: opdlab's loop, batch after batch: prompts are read once, finished rows are removed and not replaced;
- ``opdlab``: opdlab's loop as the sampler uses it;
- ``static``: transformers' loop with a cache of fixed size;
- ``compiled``: the same with the forward pass compiled, which ``--warm-up`` tokens pay for;
- ``paged``: transformers' continuous batching, ``generate_batch``.

The samples differ between methods, so times are compared per response token. Every measurement has a
process of its own; loading and warming up are not counted.

``python benchmarks/sampling.py --json sampling.json``; ``--models FOLDER --problems JSONL`` for another model.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    REPOSITORY,
    TOY_MODELS,
    ChildError,
    machine,
    pairwise_ratios,
    run_child,
    spread,
    toy_problems,
    versions,
)
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

WAYS = ("generate", "chunks", "opdlab", "static", "compiled", "paged")


# -- the child: one measurement ----------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return seconds of the wall clock and of the processor, and the number of sampled tokens."""
    from opdlab.policies import LanguageModel

    model = LanguageModel(str(arguments.models)).eval()
    prompts = _prompts(model, arguments)
    sample = globals()[f"sample_{arguments.way}"]
    # As many rows as later, because kernels are compiled for sizes.
    started = time.perf_counter()
    sample(model, prompts[: arguments.batch_size], argparse.Namespace(**vars(arguments) | {"warming_up": True}))
    warm_up = time.perf_counter() - started
    started, processor = time.perf_counter(), time.process_time()
    tokens = sample(model, prompts, argparse.Namespace(**vars(arguments) | {"warming_up": False}))
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "warm_up_seconds": warm_up,
        "tokens": tokens,
    }


def _prompts(model: Any, arguments: argparse.Namespace) -> list[list[int]]:
    if arguments.problems is None:
        return [model.tokenizer.encode(prompt) for prompt, _ in toy_problems("train", arguments.prompts)]
    lines = arguments.problems.read_text(encoding="utf-8").splitlines()[: arguments.prompts]
    chats = [[{"role": "user", "content": json.loads(line)["problem"]}] for line in lines]
    encoded: list[list[int]] = model.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True
    ).input_ids
    return encoded


def _config(model: Any, arguments: argparse.Namespace, **options: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=_max_new_tokens(arguments),
        eos_token_id=model.stop_ids,
        pad_token_id=model.tokenizer.pad_token_id,
        **options,
    )


def _max_new_tokens(arguments: argparse.Namespace) -> int:
    short: bool = arguments.warming_up and arguments.way not in (
        "static",
        "compiled",
    )  # the cache's size is compiled in
    return arguments.warm_up if short else arguments.max_new_tokens  # type: ignore[no-any-return]


def _count(tokens: Any, stop_ids: list[int]) -> int:
    """Return the number of tokens up to and including the first stop token."""
    import torch

    stops = torch.isin(tokens, torch.tensor(stop_ids)).int()
    return int((stops.cumsum(1) - stops == 0).sum())


# -- what is measured --------------------------------------------------------------------------------------------------


def sample_opdlab(model: Any, prompts: list[list[int]], arguments: argparse.Namespace, first: int = 0) -> int:
    """Sample with opdlab's sampler; ``first`` is the number of the first prompt."""
    from opdlab.policies import SamplingConfig, TransformersSampler
    from opdlab.progress import SilentProgress
    from opdlab.seeds import derive_streams

    config = SamplingConfig(max_new_tokens=_max_new_tokens(arguments), batch_size=arguments.batch_size)
    keys = range(first, first + len(prompts))
    streams = derive_streams("benchmark", arguments.seed, keys=keys, num_samples=arguments.samples)
    sampler = TransformersSampler()
    sampler.refresh(model, 0)
    return int(sampler.sample(prompts, streams, config, SilentProgress()).mask.sum())


def sample_chunks(model: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> int:
    """Sample with opdlab's sampler, as many prompts at a time as fit."""
    size = max(1, arguments.batch_size // arguments.samples)
    return sum(sample_opdlab(model, prompts[i : i + size], arguments, i) for i in range(0, len(prompts), size))


def sample_generate(
    model: Any, prompts: list[list[int]], arguments: argparse.Namespace, full: bool = False, **options: Any
) -> int:
    """Sample with transformers' loop, a batch at a time; ``full``: batches of equal shape, for compiled kernels."""
    import torch

    torch.manual_seed(arguments.seed)
    config, count = _config(model, arguments, **options), 0
    model.model.generation_config = config
    repeated = [prompt for prompt in prompts for _ in range(arguments.samples)]
    widest = max(map(len, repeated))
    for start in range(0, len(repeated), arguments.batch_size):
        rows = repeated[start : start + arguments.batch_size]
        missing = arguments.batch_size - len(rows) if full else 0
        padded = model.tokenizer.pad(
            {"input_ids": rows + missing * rows[:1]},
            padding="max_length" if full else True,
            max_length=widest if full else None,
            return_tensors="pt",
        )
        width = padded["input_ids"].shape[1]
        output = model.model.generate(
            padded["input_ids"], attention_mask=padded["attention_mask"], generation_config=config
        )
        count += _count(output[: len(rows), width:], model.stop_ids)
    return count


def sample_static(model: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> int:
    """Sample with transformers' loop and a cache of fixed size."""
    return sample_generate(model, prompts, arguments, cache_implementation="static", disable_compile=True)


def sample_compiled(model: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> int:
    """Sample with transformers' loop, a cache of fixed size and a compiled forward pass."""
    from transformers import CompileConfig

    # Without CUDA graphs, which a CPU lacks; by default transformers compiles only on accelerators.
    compiling = CompileConfig(mode="default", fullgraph=True)
    compiling._compile_all_devices = True
    return sample_generate(
        model, prompts, arguments, full=True, cache_implementation="static", compile_config=compiling
    )


def sample_paged(model: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> int:
    """Sample with transformers' continuous batching; the cache has room for exactly one batch."""
    import torch
    from transformers import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    page = 32
    pages_per_row = -(-(max(map(len, prompts)) + arguments.max_new_tokens) // page)
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=arguments.batch_size * pages_per_row,
        max_batch_tokens=max(arguments.batch_size, 2 * max(map(len, prompts))),
        max_requests_per_batch=arguments.batch_size,
        seed=arguments.seed,
    )
    outputs = model.model.generate_batch(
        [prompt for prompt in prompts for _ in range(arguments.samples)],
        generation_config=_config(model, arguments),
        continuous_batching_config=config,
        warmup=False,
    )
    if len(outputs) != len(prompts) * arguments.samples or any(output.error for output in outputs.values()):
        raise RuntimeError(f"{len(outputs)} responses, of which some may be incomplete")
    responses = [output.generated_tokens for output in outputs.values()]
    return sum(_count(torch.tensor([tokens]), model.stop_ids) for tokens in responses)


# -- the parent --------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure every method, round by round, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TOY_MODELS / "student", metavar="FOLDER", help="what samples")
    parser.add_argument("--problems", type=Path, metavar="JSONL", help="prompts of a chat model; else the toy's")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=176)
    parser.add_argument("--batch-size", type=int, default=64, help="rows at a time")
    parser.add_argument("--warm-up", type=int, default=8, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # this is a child
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        sys.stdout.flush()
        os._exit(0)  # some threads of transformers outlive their work
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    failures: dict[str, str] = {}
    for seed in range(arguments.rounds):
        for way in [way for way in rows if way not in failures]:
            try:
                rows[way].append(_child(arguments, way, seed))
            except ChildError as error:
                failures[way] = str(error).strip().splitlines()[-1]
    _print(rows, failures)
    if arguments.json:
        result = {
            "machine": machine(),
            "versions": versions("torch", "transformers", "opdlab"),
            "options": {name: value for name, value in vars(arguments).items() if name not in ("json", "way", "seed")},
            "ways": rows,
            "failures": failures,
        }
        arguments.json.write_text(json.dumps(result, indent=1, default=str))
    return 0


def _child(arguments: argparse.Namespace, way: str, seed: int) -> dict[str, float]:
    options = ("models", "prompts", "samples", "max_new_tokens", "batch_size", "warm_up")
    flags = [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    if arguments.problems is not None:
        flags += ["--problems", str(arguments.problems)]
    return run_child(Path(__file__), [*flags, "--way", way, "--seed", str(seed)], threads=arguments.threads)


def _print(rows: dict[str, list[dict[str, float]]], failures: dict[str, str]) -> None:
    table = Table("", "tokens", "seconds", "processor, us per token", "to generate's", "warm-up, s")

    def per_token(way: str) -> list[float]:
        return [1e6 * measured["processor_seconds"] / measured["tokens"] for measured in rows[way]]

    for way, measured in rows.items():
        if way in failures:
            table.add_row(way, f"cannot run: {failures[way]}")
            continue
        ratios = pairwise_ratios(per_token(way), per_token("generate")) if rows.get("generate") else []
        table.add_row(
            *(way, spread([m["tokens"] for m in measured], 0), spread([m["seconds"] for m in measured])),
            *(spread(per_token(way), 0), spread(ratios), spread([m["warm_up_seconds"] for m in measured], 1)),
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
