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
16,384 tokens is the paper's run, on one GPU of 80 GB. Then scoring alone is measured on as many positions, in bfloat16,
against the kernels of TRL, Liger and cut-cross-entropy, if they are installed.

``python benchmarks/gpu.py --json gpu.json`` on one CUDA GPU should take less than eight minutes; ``--smoke`` runs every
line of it on tiny shapes, on a CPU too. Each student and the kernels run in a process of their own, which is killed
after ``--timeout`` seconds, and the file is written after each: a part that fails or hangs costs its own figures only.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import ChildError, machine, run_child, versions
from gpu_models import CARD_BYTES, REAL, SMOKE, Plan, peak_teraflops
from gpu_phases import measure_student
from rich.console import Console
from rich.table import Table
from scoring import table as scoring_table
from scoring_peers import PEERS, Sizes, measure

GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "triton", "flash-attn")


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
    """Measure one student with its teacher, or the kernels."""
    device = torch.device(given.device)
    if given.child == "kernels":
        return {"kernels": measure_kernels(plan, given.device)}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        return measure_student(plan, given.child, Path(folder), device, given.student_dtype)


def report(result: dict[str, Any]) -> None:
    """Print tables."""
    console = Console(width=120)
    peak, name = result["peak_teraflops"], result["device"]
    smoke = result["options"]["smoke"]
    for student, found in result["students"].items():
        if "error" in found:
            console.print(f"{student}: {found['error']}")
            continue
        resident = found["resident_bytes"] / GIB
        table = Table(
            *("phase", "tokens", "s", "tokens/s", "peak GiB", "within 80 GB", "TFLOP/s", "of the peak"),
            title=_title(student, smoke=smoke) + f" on {name}: {resident:.1f} GiB resident",
        )
        for row in found["phases"]:
            table.add_row(*_cells(row, peak))
        console.print(table)
    for kernels in result["kernels"]:
        size = f"{kernels['positions']:,} x {kernels['vocabulary']:,} x {kernels['hidden']:,}"
        size += " (toy shapes)" if smoke else ""
        console.print(scoring_table(f"{kernels['task']}, {size}, {kernels['dtype']}", kernels["peers"]))


def _title(student: str, *, smoke: bool) -> str:
    if smoke:
        return f"toy shapes in place of {student} and of a 4B teacher, with snapshot and AdamW,"
    return f"{student}, snapshot and AdamW with a 4B teacher"


def _cells(row: dict[str, Any], peak: float | None) -> list[str]:
    if "skipped" in row:
        return [row["phase"], f"{row['tokens']:,}", row["skipped"]]
    memory = row["peak_bytes"]
    rate = row["flops"] / row["seconds"] / 1e12 if "flops" in row else None
    return [
        *(row["phase"], f"{row['tokens']:,}", f"{row['seconds']:.3f}", f"{row['tokens'] / row['seconds']:,.0f}"),
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
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a student, and for the kernels")
    parser.add_argument("--json", type=Path, help="write what is measured to this file, after each part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _run(given: argparse.Namespace, part: str) -> dict[str, Any]:
    flags = ["--child", part, "--device", given.device, "--student-dtype", given.student_dtype]
    flags += ["--smoke"] if given.smoke else []
    flags += ["--folder", str(given.folder)] if given.folder else []
    print(f"{part} …", file=sys.stderr)
    try:
        return run_child(
            Path(__file__), flags, threads=torch.get_num_threads(), device=given.device, timeout=given.timeout
        )
    except ChildError as error:
        return {"error": str(error)[-600:], "kernels": []}


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
        print(json.dumps(child(given, plan)))
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
    failed = []
    for part in (*(given.students or plan.students), "kernels"):
        found = _run(given, part)
        if "error" in found:
            failed.append(found["error"])
        if part == "kernels":
            result["kernels"] = found["kernels"]
        else:
            result["students"][part] = found
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    report(result)
    for error in failed:
        print(error, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
