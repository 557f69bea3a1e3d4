"""Cost of opdlab on a GPU at the sizes of real models: memory, tokens per second, share of the peak.

Students Qwen3-0.6B and Qwen3-1.7B with a Qwen3-4B teacher, of the published shapes with random weights and no
download. Student, behavior snapshot, AdamW's state and teacher stay on the GPU, as in a run:

- **sample**: the snapshot samples a few short responses;
- **teacher**: log-probabilities, top K and their mass of one response;
- **update**: one micro-batch of one response: the student's forward pass with checkpointed layers, LSM with K = 32 and
  the drift, Block64, backward pass, AdamW's step. Its share of the peak counts the model's operations once: layers
  forward and backward, causal attention, the head forward and its K rows backward; repeated operations of checkpointing
  are not counted.

By default weights of student and snapshot are float32 and arithmetic is bfloat16, as in ``configs/paper``; 1.7B at
16,384 tokens is the paper's run, on one GPU of 80 GB. Then

- **kernels**: scoring alone on as many positions, in bfloat16, against the kernels of TRL, Liger and cut-cross-entropy,
  if they are installed;
- **vllm**: vLLM in the process of a student of 1.7B: start, sampling, a refresh of the weights, sleeping and waking;
- **fsdp2**: the phases above with weights sharded by FSDP2 over all GPUs that are there, or over one;
- **packing**: an update of a micro-batch of responses of different lengths, padded, and packed with flash attention.

What needs a package that is missing is skipped, with the reason.

``python benchmarks/gpu.py --json gpu.json`` takes at most ``--seconds`` (470): each part runs in processes of its own,
which are killed after ``--timeout`` seconds or at the end of the time, and parts for which none is left are skipped.
The file is written after each part: one that fails or hangs costs its own figures only. ``--smoke`` runs every line on
tiny shapes, on a CPU too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ChildError, machine, run_child, run_ranks, versions
from gpu_models import CARD_BYTES, REAL, SMOKE, Plan, peak_teraflops
from gpu_parts import SHARDED_STUDENT, measure_engine, measure_packing, measure_sharded
from gpu_phases import measure_student, save_models
from rich.console import Console
from rich.table import Table
from scoring import table as scoring_table
from scoring_peers import PEERS, Sizes, measure

GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "triton", "flash-attn", "vllm")
PARTS = ("students", "kernels", "vllm", "fsdp2", "packing")
_LEAST_SECONDS = 20.0  # for a part


def measure_kernels(plan: Plan, device: str) -> list[dict[str, Any]]:
    """Measure scoring alone, one size after the other; in one process, because each frees its memory."""
    found = []
    for positions in plan.kernel_positions:
        sizes = Sizes(positions, plan.teacher.vocab_size, plan.kernel_hidden, plan.k, "bfloat16", device)
        for task in ("logprobs", "lsm"):
            rows = {}
            for peer in PEERS:
                rows[peer] = [measure(peer, task, sizes)]
                if device != "cpu":
                    torch.cuda.empty_cache()
            found.append({"task": task, **asdict(sizes), "peers": rows})
    return found


def child(given: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Measure one student with its teacher, or another part."""
    device = torch.device(given.device)
    if given.child == "kernels":
        return {"kernels": measure_kernels(plan, given.device)}
    if given.child == "fsdp2":
        return measure_sharded(plan, given.folder, device, given.student_dtype)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if given.child == "vllm":
            return measure_engine(plan, folder, device)
        if given.child == "packing":
            return measure_packing(plan, folder, device)
        save_models(plan, given.child, folder, device, given.student_dtype)
        return measure_student(plan, given.child, folder, device, given.student_dtype)


def report(result: dict[str, Any]) -> None:
    """Print tables."""
    console = Console(width=120)
    smoke = result["options"]["smoke"]
    for student, found in result["students"].items():
        _print_phases(console, result, found, student, smoke, "")
    for kernels in result["kernels"]:
        size = f"{kernels['positions']:,} x {kernels['vocabulary']:,} x {kernels['hidden']:,}"
        size += " (toy shapes)" if smoke else ""
        console.print(scoring_table(f"{kernels['task']}, {size}, {kernels['dtype']}", kernels["peers"]))
    if engine := result.get("vllm"):
        console.print(f"vLLM: {_of_engine(engine)}")
    if sharded := result.get("fsdp2"):
        count = sharded.get("processes", 0)
        _print_phases(console, result, sharded, SHARDED_STUDENT, smoke, f", FSDP2 over {count} processes")
    if packing := result.get("packing"):
        title = f"update of {len(packing.get('lengths', ()))} responses, 1.7B in bfloat16{', toy shapes' * smoke}"
        _print_phases(console, result, {**packing, "phases": packing.get("rows", [])}, title, smoke, None)


def _print_phases(
    console: Console, result: dict[str, Any], found: dict[str, Any], name: str, smoke: bool, more: str | None
) -> None:
    if reason := found.get("error") or found.get("skipped"):
        console.print(f"{name}{more or ''}: {reason}")
        return
    title = name
    if more is not None:
        title = (
            f"{_title(name, smoke=smoke)}{more} on {result['device']}: {found['resident_bytes'] / GIB:.1f} GiB resident"
        )
    columns = ("phase", "tokens", "s", "tokens/s", "peak GiB", "within 80 GB", "TFLOP/s", "of the peak")
    table = Table(*columns, title=title)
    for row in found["phases"]:
        table.add_row(*_cells(row, result["peak_teraflops"]))
    console.print(table)


def _title(student: str, *, smoke: bool) -> str:
    if smoke:
        return f"toy shapes in place of {student} and of a 4B teacher, with snapshot and AdamW"
    return f"{student}, snapshot and AdamW with a 4B teacher"


def _of_engine(found: dict[str, Any]) -> str:
    if reason := found.get("error") or found.get("skipped"):
        return str(reason)
    rate, freed = found["sample_tokens_per_second"], found["freed_bytes"] / GIB
    return (
        f"{rate:,.0f} tokens/s for {found['responses']} responses, start {found['start_seconds']:.1f} s, refresh "
        f"{found['refresh_seconds']:.2f} s, sleep {found['sleep_seconds']:.2f} s (frees {freed:.1f} GiB), waking and "
        f"refresh {found['wake_and_refresh_seconds']:.2f} s"
    )


def _cells(row: dict[str, Any], peak: float | None) -> list[str]:
    if "skipped" in row:
        return [row["phase"], f"{row['tokens']:,}", row["skipped"]]
    memory, tokens = row["peak_bytes"], row["tokens"]
    rate = row["flops"] / row["seconds"] / 1e12 if "flops" in row else None
    return [
        *(row["phase"], f"{tokens:,}" if tokens else "-", f"{row['seconds']:.3f}"),
        f"{tokens / row['seconds']:,.0f}" if tokens else "-",
        *(f"{memory / GIB:.1f}", "yes" if memory < CARD_BYTES else "no"),
        "-" if rate is None else f"{rate:.3g}",
        "-" if rate is None or peak is None else f"{rate / peak:.0%}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too: shows that it runs")
    parser.add_argument("--device", help="cuda by default; with --smoke cpu where there is no GPU")
    parser.add_argument("--students", nargs="+", choices=REAL.students, help="all by default")
    parser.add_argument("--student-dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bfloat16, dense; known for common ones")
    parser.add_argument("--folder", type=Path, help="for random models, up to 15 GB (default: the system's)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a student, and for another part")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--json", type=Path, help="write what is measured to this file, after each part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _run(given: argparse.Namespace, part: str, left: float) -> dict[str, Any]:
    """Return what a part has measured, or why it has not.

    Args:
        given: command line.
        part: a student, or one of ``PARTS``.
        left: seconds.
    """
    if left < _LEAST_SECONDS:
        return {"skipped": f"no time is left of {given.seconds:g} s; --parts {part} measures it alone"}
    flags = ["--child", part, "--device", given.device, "--student-dtype", given.student_dtype]
    flags += ["--smoke"] if given.smoke else []
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "device": given.device}
    facts["timeout"] = min(given.timeout, left)
    print(f"{part} …", file=sys.stderr)
    try:
        if part != "fsdp2":
            folder = ["--folder", str(given.folder)] if given.folder else []
            return run_child(Path(__file__), [*flags, *folder], **facts)
        count = 2 if given.device == "cpu" else torch.cuda.device_count()
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            return run_ranks(Path(__file__), [*flags, "--folder", name], count=count, **facts)
    except ChildError as error:
        return {"error": str(error)[-600:]}


def _measure(given: argparse.Namespace, result: dict[str, Any], students: list[str]) -> list[str]:
    """Measure all parts into ``result``, write it after each, and return what went wrong."""
    began, failed = time.monotonic(), []
    for part in given.parts:
        for name in students if part == "students" else (part,):
            found = _run(given, name, given.seconds - (time.monotonic() - began))
            failed += [found["error"]] if "error" in found else []
            if part == "students":
                result["students"][name] = found
            elif part == "kernels":
                result["kernels"] = found.get("kernels", [])
            else:
                result[part] = found
            if given.json:
                given.json.write_text(json.dumps(result, indent=1) + "\n")
    return failed


def main() -> int:
    """Measure, print, write; return 2 without a GPU."""
    given = _parser().parse_args()
    has_gpu = torch.cuda.is_available()
    given.device = given.device or ("cuda" if has_gpu or not given.smoke else "cpu")
    if not (given.smoke if given.device == "cpu" else has_gpu):
        print("gpu.py: no CUDA device is there: run it on a GPU, or with --smoke on a CPU", file=sys.stderr)
        return 2
    plan = SMOKE if given.smoke else REAL
    if given.child:
        found = child(given, plan)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return 0
    name = "CPU" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "device": name,
        "peak_teraflops": given.peak_tflops or peak_teraflops(name),
        "options": {"smoke": given.smoke, "student_dtype": given.student_dtype},
        "students": {},
        "kernels": [],
    }
    failed = _measure(given, result, given.students or list(plan.students))
    report(result)
    for error in failed:
        print(error, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
