"""The page of a logged step: one file that loads no other file."""

import base64
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opdlab.diagnostics.metric_table import metric_title
from opdlab.files import replacing
from opdlab.types import Problem
from opdlab.viewer.rollouts import ShownRollout
from opdlab.viewer.token_colors import color_scale, quantities

INDEX = "index.html"
MAX_PAGES = 64
"""Pages of a run that are kept."""
_PAGE = re.compile(r"step-(\d{6,})\.html")
_LINKS = re.compile(rb"<!--steps-->.*\n")  # in the head, before any text of a model
# JSON between single quotes, with <, >, & and ' written as \u003c and so on; it precedes all text of models.
_SUMMARY = re.compile(rb"<meta name=\"opdlab-summary\" content='([^']*)'>")
_HEAD = 1 << 14  # bytes of a page; the summary is within the first few hundred


@dataclass(frozen=True)
class RolloutText:
    """Text of a rollout.

    Args:
        prompt: decoded, special tokens included.
        tokens: T texts, see :func:`opdlab.viewer.token_texts`.
        special: T flags: True for special tokens.
        problem: source of the prompt, if it is known.
        teacher_prompt: the prompt that the teacher has seen, if it is another one.
    """

    prompt: str
    tokens: Sequence[str]
    special: Sequence[bool]
    problem: Problem | None = None
    teacher_prompt: str | None = None


def render_page(
    step: int, rollouts: Sequence[ShownRollout], texts: Sequence[RolloutText], facts: dict[str, str] | None = None
) -> str:
    """Return the HTML page of a step.

    Text of models is in a JSON block, in which no markup can begin, and is inserted as text nodes. The page's policy
    forbids every request, and every script and style except its own.

    Args:
        step: optimizer steps taken.
        rollouts: shown on the page; they all have the same quantities.
        texts: of each.
        facts: of the run, for the head of the page, by name.
    """
    environment, assets = page_templates()
    facts = facts or {}
    summary = {"metrics": _summary(rollouts), "facts": facts}
    return environment.get_template("page.html").render(
        **assets, step=step, facts=facts, summary=summary, data=_page_data(rollouts, texts)
    )


def page_name(step: int) -> str:
    """Return the name of a step's file; up to a million steps, names sort in the order of the steps.

    Example:
        >>> page_name(200)
        'step-000200.html'
    """
    return f"step-{step:06d}.html"


def write_page(folder: Path, step: int, page: str, max_pages: int = MAX_PAGES) -> Path:
    """Write a page, link it with its neighbours, and update the index. Files are replaced atomically.

    Pages above the bound are deleted, so that the others stay spread over the steps: the first page, the last one and
    the one just written remain. So neither the folder nor the time of a call grows with the length of the run.

    Args:
        folder: of the run's pages; created if missing.
        step: of the page; an earlier page of the same step is replaced.
        page: see :func:`render_page`.
        max_pages: pages that are kept, at least 2.

    Returns:
        Path of the page.

    Raises:
        OSError: the folder cannot be written.
        FullDiskError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / page_name(step), page.encode())
    _list_pages(folder, step, _surplus(_steps(folder), step, max_pages))
    return folder / page_name(step)


def drop_pages_after(folder: Path, step: int) -> None:
    """Delete the pages of steps that a run took before it was resumed at an earlier one, and now takes another time.

    Args:
        folder: of the run's pages, which may be missing.
        step: optimizer steps taken.

    Raises:
        OSError: the folder cannot be written.
    """
    if gone := [each for each in _steps(folder) if each > step]:
        _list_pages(folder, step, gone)


def _steps(folder: Path) -> list[int]:
    """Return the steps that have a page, in order."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(match[1]) for file in files if (match := _PAGE.fullmatch(file.name)))


def _list_pages(folder: Path, step: int, gone: Sequence[int]) -> None:
    """Delete some steps' pages, and link and list those that stay, of which that of ``step`` may be new."""
    for each in gone:
        (folder / page_name(each)).unlink(missing_ok=True)
    steps = _steps(folder)
    changed = {bisect_left(steps, each) + side for each in (step, *gone) for side in (-1, 0, 1)}
    for index in sorted(changed & set(range(len(steps)))):
        neighbours = {"prev": steps[index - 1 : index], "next": steps[index + 1 : index + 2]}
        links = "".join(f'<link rel="{side}" href="{page_name(to[0])}">' for side, to in neighbours.items() if to)
        path = folder / page_name(steps[index])
        content = path.read_bytes()
        linked = _LINKS.sub(f"<!--steps-->{links}\n".encode(), content, count=1)
        if linked != content:
            _replace(path, linked)
    pages = {each: _read_summary(folder / page_name(each)) for each in steps}
    facts = next((page["facts"] for page in reversed(list(pages.values())) if page["facts"]), {})
    columns = list(dict.fromkeys(name for page in pages.values() for name in page["metrics"]))
    environment, assets = page_templates()
    index_page = environment.get_template("index.html").render(
        **assets, pages=pages, columns=columns, facts=facts, run=folder.absolute().parent.name
    )
    _replace(folder / INDEX, index_page.encode("utf-8", "replace"))


def _surplus(steps: Sequence[int], kept: int, max_pages: int) -> list[int]:
    """Return the steps whose pages are above the bound: those whose neighbours are nearest to each other."""
    left, gone = list(steps), []
    while len(left) > max_pages:
        inner = [place for place in range(1, len(left) - 1) if left[place] != kept]
        if not inner:
            break
        gone.append(left.pop(min(inner, key=lambda place: left[place + 1] - left[place - 1])))
    return gone


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


# -- the summary in the head of a page, a few metrics, which the index reads ------------------------------------------


def _summary(rollouts: Sequence[ShownRollout]) -> dict[str, str]:
    """Return counts and ranges over the rollouts of a page, by label."""
    if not rollouts:
        return {}
    verdicts = [rollout.correct for rollout in rollouts if rollout.correct is not None]
    metrics = {
        "rollouts shown": f"{len(rollouts)} of {rollouts[0].num_ranked}",
        "correct": f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "unchecked",
    }
    drifts, ages = sorted(rollout.mean_drift for rollout in rollouts), sorted(rollout.age for rollout in rollouts)
    ranges = {"train/drift/token_mean": (f"{drifts[0]:.3g}", f"{drifts[-1]:.3g}"), "rollout/age": (ages[0], ages[-1])}
    for name, ends in ranges.items():
        metrics[metric_title(name)] = " to ".join(map(str, dict.fromkeys(ends)))  # once if they are equal
    return metrics


def _read_summary(path: Path) -> dict[str, dict[str, str]]:
    """Return metrics and facts in the head of a page; empty ones if opdlab did not write them."""
    try:
        with path.open("rb") as page:
            found = _SUMMARY.search(page.read(_HEAD))
        read = json.loads(found[1]) if found else {}
    except (OSError, ValueError):
        read = {}
    summary = {}
    for name, earlier in (("metrics", "figures"), ("facts", "facts")):  # the name in pages of earlier versions
        part = read.get(name) or read.get(earlier) if isinstance(read, dict) else None
        summary[name] = {key: str(value) for key, value in part.items()} if isinstance(part, dict) else {}
    return summary


# -- what the script of the page unpacks ----------------------------------------------------------------------------


def _page_data(rollouts: Sequence[ShownRollout], texts: Sequence[RolloutText]) -> dict[str, Any]:
    shown = []
    for quantity in quantities(list(rollouts[0].values)) if rollouts else []:
        values = torch.cat([rollout.values[quantity.name][rollout.mask] for rollout in rollouts])
        shown.append({**asdict(quantity), **asdict(color_scale(values, quantity.neutral))})
    return {"quantities": shown, "rollouts": [_packed(*pair) for pair in zip(rollouts, texts, strict=True)]}


def _packed(rollout: ShownRollout, text: RolloutText) -> dict[str, Any]:
    segments, lengths = torch.unique_consecutive(rollout.segment_ids, return_counts=True)
    values: dict[str, Any] = {}
    for name, column in rollout.values.items():
        heads = column[lengths.cumsum(0) - lengths]
        equal = len(heads) < len(column) and torch.equal(heads.repeat_interleave(lengths), column)
        values[name] = {"runs": _base64(heads)} if equal else _base64(column)
    return {
        "id": rollout.rollout_id,
        "rank": rollout.rank,
        "num_ranked": rollout.num_ranked,
        "mean_drift": f"{rollout.mean_drift:.3g} nats",
        "prompt": text.prompt,
        "teacher_prompt": text.teacher_prompt,
        "gold": text.problem and text.problem.answer,
        "correct": rollout.correct,
        "demonstration": rollout.demonstration,
        "stop": rollout.stop_reason.name.lower(),
        "age": rollout.age,
        "reuse_epoch": rollout.reuse_epoch,
        "texts": list(text.tokens),
        "special": [index for index, special in enumerate(text.special) if special],
        "ids": _base64(rollout.tokens),
        "segments": _base64(segments),  # -1: not in the loss
        "runs": _base64(lengths),  # of positions of one segment
        "values": values,
    }


def _base64(tensor: torch.Tensor) -> str:
    """Return base64 of four bytes per number, little-endian: exact for all values, and shorter than digits."""
    kind = "<f4" if tensor.is_floating_point() else "<i4"
    return base64.b64encode(tensor.numpy().astype(kind).tobytes()).decode("ascii")


# -- templates ------------------------------------------------------------------------------------------------------


@cache
def page_templates(
    packages: tuple[str, ...] = ("opdlab.viewer",), styles: tuple[str, ...] = ("page.css",), script: str = "page.js"
) -> tuple[Environment, dict[str, Markup]]:
    """Return templates of pages that stand alone; and style, script, and the policy that allows only these two.

    Args:
        packages: have a folder ``templates`` each; of two files with one name the earlier package's is taken.
        styles: files of the style, one after another.
        script: file of the script.
    """
    loader = ChoiceLoader([PackageLoader(package) for package in packages])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` escapes <, >, & and ' as \\u003c …, and all non-ASCII characters: U+2028, lone surrogates.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals["page_name"] = page_name
    assets, policy = {}, "default-src 'none'"
    for name, kind, files in (("css", "style-src", styles), ("js", "script-src", (script,))):
        text = "".join(loader.get_source(environment, file)[0] for file in files)
        policy += f"; {kind} 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        assets[name] = Markup(text)
    return environment, {**assets, "policy": Markup(f"{policy}; base-uri 'none'; form-action 'none'")}
