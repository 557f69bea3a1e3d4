"""What gates did to the gradient, beside what they did to pass@1: tables and pictures of ``docs/results/why.md``.

``python docs/scripts/why.py runs/studies/why`` takes the replays of the study's runs, each made with ``opdlab replay
RUN/version_0 --gates none GATE --steps 10 20 30 40 50 60 --parts``, into ``docs/results/why/steps.csv`` (each stale
step, without a gate and under the run's own) and ``parts.csv`` (means over them by run); those of
``runs/studies/why-staleness``, at every tenth step up to 120, into ``old-steps.csv`` and ``old-parts.csv``. Without a
folder it makes tables and pictures from these files and from the studies' reports. A table stands between
``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from opdlab.replay.parts import KINDS, QUARTERS
from opdlab.report.study.sentences import number
from opdlab.report.table import Table

RESULTS = Path(__file__).parents[1] / "results"
STUDY = Path(__file__).parents[2] / "configs" / "studies" / "why.yaml"
PAGE, FOLDER = RESULTS / "why.md", RESULTS / "why"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
STUDIES = ("granularity-lsm", "controls-lsm", "rate", "objectives-gates")  # a variant's name begins with its study's
NO_GATE, OWN = "none", "own"
STEPS = (10, 20, 30, 40, 50, 60)
OLD = "why-staleness"  # the study with a snapshot for 64 steps, which has files of its own
OLD_STEPS = range(10, 121, 10)
REFRESHED = 64  # optimizer step at which its snapshot takes the student's weights
AGES = ((1, 3), (7, 9), (11, 13))  # optimizer steps; those of the replayed steps are 9, 3, 13, 7, 1, 11
DRAWN = ("granularity-lsm-block64", "granularity-lsm-token", "controls-lsm-horizon")  # by age and by part
HARMFUL = ("controls-lsm-horizon", "rate-token-high")  # beside the runs at the studies' own rate in the table of parts
_STEP = ("step", "age", "effective_sample_size", "ungated_norm_ratio", "gradient_norm")
_FRESH = ("fresh_cosine", "fresh_change", "fresh_norm_ratio", "fresh_ceiling")
_PART = ("position_share", "drift_size", "weight_mean", "weight_share", "gradient_norm", "fresh_projection")
_DIGITS = 6


# -- from replays to files -------------------------------------------------------------------------------------------


def gather(study: Path) -> None:
    """Write both files from the replays of a study's runs."""
    steps: list[pd.DataFrame] = []
    parts: list[pd.DataFrame] = []
    prefix, replayed = ("old-", OLD_STEPS) if study.name == OLD else ("", STEPS)
    for replay in sorted(study.glob("runs/*/*/version_0/replay")):
        about = {"variant": replay.parts[-4], "seed": int(replay.parts[-3].removeprefix("seed-"))}
        for found, name, wanted in ((steps, "replay", (*_STEP, *_FRESH)), (parts, "parts", ("part", *_PART))):
            rows = pd.read_csv(replay / f"{name}.csv", keep_default_na=False, na_values=[""])
            gates = rows["gate"].where(~rows["own"], OWN)
            kept = gates.isin((NO_GATE, OWN)) & rows["step"].isin(replayed) & (rows["age"] > 0)
            found.append(rows.assign(gate=gates, **about)[kept][["variant", "seed", "gate", *wanted]])
    FOLDER.mkdir(exist_ok=True)
    pd.concat(steps).round(_DIGITS).to_csv(FOLDER / f"{prefix}steps.csv", index=False)
    means = pd.concat(parts).groupby(["variant", "seed", "gate", "part"]).mean().reset_index()
    means.round(_DIGITS).to_csv(FOLDER / f"{prefix}parts.csv", index=False)


# -- what the tables show --------------------------------------------------------------------------------------------


def measured(variant: str) -> dict[str, object]:
    """Return the comparison of pass@1 that a variant has in the study that its name begins with."""
    study = next(name for name in STUDIES if variant.startswith(f"{name}-"))
    found = pd.read_csv(RESULTS / study / "tables" / "comparisons.csv")
    here = (found["metric"] == "pass@1") & (found["variant"] == variant.removeprefix(f"{study}-"))
    (row,) = found[here].to_dict("records")
    return {"study": study, **row}


def over_runs(values: pd.DataFrame, by: list[str], figures: list[str]) -> pd.DataFrame:
    """Return mean and standard error over seeds of each seed's mean, by group."""
    runs = values.groupby([*by, "seed"], sort=False)[figures].mean()
    return runs.groupby(by, sort=False).agg(["mean", "sem"])


def gates() -> pd.DataFrame:
    """Return a row for each variant: what its gate did to the gradient, and the measured difference of pass@1."""
    steps = pd.read_csv(FOLDER / "steps.csv")
    own = over_runs(
        steps[steps["gate"] == OWN],
        ["variant"],
        ["effective_sample_size", "ungated_norm_ratio", "fresh_change"],
    )
    without = over_runs(steps[steps["gate"] == NO_GATE], ["variant"], ["fresh_cosine"])
    labels = {each["name"]: each["label"] for each in yaml.safe_load(STUDY.read_text(encoding="utf-8"))["variants"]}
    rows = []
    for variant, row in own.iterrows():
        plain, found = without.loc[variant], measured(str(variant))
        rows.append(
            {
                "variant": variant,
                "label": labels[str(variant)],
                **{name: found[name] for name in ("study", "difference", "low", "high")},
                "sample_size": row["effective_sample_size", "mean"],
                "norm": row["ungated_norm_ratio", "mean"],
                "cosine": plain["fresh_cosine", "mean"],
                "change": row["fresh_change", "mean"],
                "change_se": row["fresh_change", "sem"],
            }
        )
    return pd.DataFrame(rows)


def ages() -> pd.DataFrame:
    """Return the cosine without a gate, its ceiling, and the change under the variant's gate, by variant and age."""
    steps = pd.read_csv(FOLDER / "steps.csv")
    rows = []
    for first, last in AGES:
        here = steps[steps["age"].between(first, last)]
        own = over_runs(here[here["gate"] == OWN], ["variant"], ["fresh_change"])
        plain = over_runs(here[here["gate"] == NO_GATE], ["variant"], ["fresh_cosine", "fresh_ceiling"])
        rows += [
            {
                "variant": variant,
                "age": f"{first} to {last}",
                "cosine": plain.loc[variant, ("fresh_cosine", "mean")],
                "ceiling": plain.loc[variant, ("fresh_ceiling", "mean")],
                "change": row["fresh_change", "mean"],
                "change_se": row["fresh_change", "sem"],
            }
            for variant, row in own.iterrows()
        ]
    return pd.DataFrame(rows)


def parts() -> pd.DataFrame:
    """Return shares by variant, gate and part: of positions, weight, and of the way along the fresh gradient."""
    found = pd.read_csv(FOLDER / "parts.csv")
    means = found.groupby(["variant", "gate", "part"], sort=False)[list(_PART)].mean().reset_index()
    whole = means[means["part"].isin(QUARTERS)].groupby(["variant", "gate"])["fresh_projection"].sum()
    of_row = whole.reindex(pd.MultiIndex.from_frame(means[["variant", "gate"]])).to_numpy()
    return means.assign(along_share=means["fresh_projection"] / of_row)


def _ungated(found: pd.DataFrame) -> pd.DataFrame:
    """Return the means by part without a gate, over the runs of LSM at the studies' own rate."""
    at_one_rate = found["variant"].str.startswith(("granularity-lsm-", "controls-lsm-"))
    here = found[(found["gate"] == NO_GATE) & at_one_rate]
    return here.groupby("part")[["position_share", "drift_size", "along_share"]].mean()


# -- tables ----------------------------------------------------------------------------------------------------------


def _change(value: float, error: float) -> str:
    return f"{number(value, sign=True)} ± {number(error)}"


def _gate_table() -> str:
    rows = [
        [
            *(row.label, row.study, f"{row.sample_size:.2f}", f"{row.norm:.2f}", f"{row.cosine:.3f}"),
            *(_change(row.change, row.change_se), number(row.difference, sign=True)),
            f"{number(row.low, sign=True)} to {number(row.high, sign=True)}",
        ]
        for row in gates().itertuples()
    ]
    head = (
        *("gate", "study", "effective sample size", "norm / ungated", "cosine without"),
        *("change of the cosine", "measured: pass@1", "95% interval"),
    )
    return Table(head, rows, num_names=2).markdown().rstrip()


def _age_table() -> str:
    found, labels = ages(), dict(gates()[["variant", "label"]].to_numpy())
    names = list(dict.fromkeys(found["age"]))
    rows = []
    for variant, here in found.groupby("variant", sort=False):
        cells = here.set_index("age")
        shown = [_change(cells.loc[name, "change"], cells.loc[name, "change_se"]) for name in names]
        rows.append([labels[variant], *(f"{cells.loc[name, 'cosine']:.2f}" for name in names), *shown])
    head = ("gate", *(f"cosine, {name}" for name in names), *(f"change, {name}" for name in names))
    return Table(head, rows, num_names=1).markdown().rstrip()


def _part_table() -> str:
    found, labels = parts(), dict(gates()[["variant", "label"]].to_numpy())
    own, plain = found[found["gate"] == OWN], _ungated(found)
    names = [*QUARTERS, "first tokens", *(kind for kind in KINDS if kind in set(found["part"]))]
    rows = [
        ["share of the positions", *(f"{plain.loc[name, 'position_share']:.2f}" for name in names)],
        ["mean size of the drift, nats", *(f"{plain.loc[name, 'drift_size']:.3f}" for name in names)],
        ["share of the way, no gate", *(f"{plain.loc[name, 'along_share']:.2f}" for name in names)],
    ]
    for variant in HARMFUL:
        here = found[(found["gate"] == NO_GATE) & (found["variant"] == variant)].set_index("part").loc[names]
        runs = f"no gate, runs of {labels[variant]}"
        rows += [
            [f"mean size of the drift, nats, {runs}", *(f"{size:.3f}" for size in here["drift_size"])],
            [f"share of the way, {runs}", *(f"{share:.2f}" for share in here["along_share"].round(2) + 0.0)],
        ]
    for variant, here in own.groupby("variant", sort=False):
        weights = here.set_index("part")["weight_mean"]
        rows.append([f"mean weight, {labels[variant]}", *(f"{weights[name]:.2f}" for name in names)])
    return Table(("", *names), rows, num_names=1).markdown().rstrip()


def old_snapshots() -> pd.DataFrame:
    """Return what Block64 did to the gradient with a snapshot for 64 steps, by rate and by snapshot."""
    steps = pd.read_csv(FOLDER / "old-steps.csv")
    steps = steps[steps["variant"].str.contains("block64")]
    steps["snapshot"] = np.where(steps["step"] <= REFRESHED, "first", "second")
    by = ["variant", "snapshot"]
    own = over_runs(steps[steps["gate"] == OWN], by, ["effective_sample_size", "ungated_norm_ratio", "fresh_change"])
    without = over_runs(steps[steps["gate"] == NO_GATE], by, ["fresh_cosine", "gradient_norm"])
    return own.join(without).reset_index()


def _old_table() -> str:
    study = yaml.safe_load(STUDY.with_name(f"{OLD}.yaml").read_text(encoding="utf-8"))
    labels = {each["name"]: each["label"] for each in study["variants"]}
    rows = [
        [
            *(labels[row["variant", ""]], row["snapshot", ""]),
            f"{row['effective_sample_size', 'mean']:.2f}",
            f"{row['ungated_norm_ratio', 'mean']:.2f}",
            f"{row['gradient_norm', 'mean']:.4f}",
            f"{row['fresh_cosine', 'mean']:.3f}",
            _change(row["fresh_change", "mean"], row["fresh_change", "sem"]),
        ]
        for _, row in old_snapshots().iterrows()
    ]
    head = (
        *("gate", "snapshot", "effective sample size", "norm / ungated", "ungated norm"),
        *("cosine without", "change of the cosine"),
    )
    return Table(head, rows, num_names=2).markdown().rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "gates": _gate_table,
    "ages": _age_table,
    "parts": _part_table,
    "old": _old_table,
}


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


# -- pictures --------------------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(7.5, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def predicted_and_measured() -> Figure:
    """Return a picture of pass@1's difference against the change of the cosine, a point for each gate."""
    figure, found = _figure(4.6), gates()
    axes = figure.subplots()
    axes.axhline(0, color="0.6", linewidth=1)
    axes.axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(found.itertuples()):
        spread = [[row.difference - row.low], [row.high - row.difference]]
        label = f"{row.label} ({row.study})"
        axes.errorbar(
            row.change, row.difference, spread, row.change_se, marker="o", capsize=2, linestyle="", label=label,
            color=f"C{place}",
        )  # fmt: skip
    axes.set(xlabel="change of the cosine with a fresh gradient", ylabel="measured difference of pass@1")
    axes.set_title("A predicted benefit and a measured one")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def by_age() -> Figure:
    """Return a picture of the cosine without a gate, its ceiling, and what three gates change, by age."""
    figure, found = _figure(5.2), ages()
    upper, lower = figure.subplots(2, 1, sharex=True)
    names, labels = list(dict.fromkeys(found["age"])), dict(gates()[["variant", "label"]].to_numpy())
    at_one_rate = found[found["variant"].isin(DRAWN)].groupby("age", sort=False)[["cosine", "ceiling"]].mean()
    upper.plot(names, at_one_rate["ceiling"], "k--", marker="_", label="between two fresh gradients")
    upper.plot(names, at_one_rate["cosine"], color="0.35", marker="o", label="stale, no gate")
    lower.axhline(0, color="0.6", linewidth=1)
    for place, variant in enumerate(DRAWN):
        here = found[found["variant"] == variant]
        lower.errorbar(
            names, here["change"], here["change_se"], marker="o", capsize=2, color=f"C{place}", label=labels[variant]
        )
    upper.set(
        ylabel="cosine with a fresh gradient", title="Drift turns the gradient away, and gates do not turn it back"
    )
    lower.set(xlabel="age of the rollouts, optimizer steps", ylabel="change under a gate")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, frameon=False)
    return figure


def by_part() -> Figure:
    """Return a picture of where the positions, the way along the fresh gradient, and the weights are."""
    figure, found = _figure(4.6), parts()
    upper, lower = figure.subplots(2, 1, sharex=True)
    names = [*QUARTERS, *(kind for kind in KINDS if kind in set(found["part"]))]
    labels = dict(gates()[["variant", "label"]].to_numpy())
    plain = _ungated(found).loc[names]
    places = np.arange(len(names))
    upper.bar(places - 0.2, plain["position_share"], 0.4, color="0.7", label="share of the positions")
    upper.bar(
        places + 0.2, plain["along_share"], 0.4, color="0.35", label="share of the way along a fresh gradient, no gate"
    )
    lower.axhline(1, color="0.6", linewidth=1)
    for place, variant in enumerate(DRAWN):
        own = found[(found["gate"] == OWN) & (found["variant"] == variant)].set_index("part").loc[names]
        lower.bar(places + 0.27 * (place - 1), own["weight_mean"], 0.25, color=f"C{place}", label=labels[variant])
    lower.set_xticks(places, [name.replace("quarter", "quarter\n") for name in names])
    upper.set(title="Where the gradient comes from, and where gates put weight")
    lower.set(ylabel="mean weight")
    for axes in (upper, lower):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, frameon=False)
    return figure


PICTURES = {"predicted": predicted_and_measured, "age": by_age, "parts": by_part}


def main() -> None:
    """Write files, pictures and tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", help="folder of the study, whose runs were replayed")
    study = parser.parse_args().study
    if study is not None:
        gather(study)
    for name, picture in PICTURES.items():
        picture().savefig(FOLDER / f"{name}.png", metadata={})
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
