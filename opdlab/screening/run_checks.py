"""Checks of the run: the objective that suits the pair, memory and time."""

from opdlab.screening.advice import advise
from opdlab.screening.measure import Measurements
from opdlab.screening.pair import ConfiguredRun, Missing
from opdlab.screening.thresholds import LIMITS
from opdlab.screening.verdicts import Check, checked, unmeasured, worse

# A training step runs forward and backward, which takes about three times as long as scoring.
_UPDATE = 3
_HOUR = 3600


def run_checks(found: Measurements, gives_hidden: bool) -> list[Check]:
    """Return the checks of objective, memory and time.

    Args:
        found: the measurements.
        gives_hidden: True if the teacher can be compared over the whole vocabulary.
    """
    return [_objective(found, gives_hidden), _memory(found), _time(found)]


def _objective(found: Measurements, gives_hidden: bool) -> Check:
    if isinstance(found.gap, Missing):
        return unmeasured("objective", found.gap)
    advice = advise(found.gap, gives_hidden)
    what = "the whole vocabulary" if advice.k is None else f"K {advice.k}, tail {advice.tail}"
    finding = f"{advice.objective} with {what} suits the pair: {advice.mass:.3f} of the probability is in that support"
    if advice.k is None:
        finding = (
            f"{advice.objective} over {what} suits the pair: the teacher's {found.gap.k} most likely tokens have only "
            f"{advice.mass:.3f} of the probability"
        )
    verdict = LIMITS["objective"].verdict(advice.mass)
    if not isinstance(found.run, Missing):
        k, name = found.run.k, found.run.objective
        finding += f"; the configuration has {name}" + ("" if k is None else f" with K {k}")
        if k is not None and advice.k is not None and k < advice.k:
            verdict = worse(verdict, "look")
    return checked("objective", advice.mass, finding, advice.options, verdict=verdict)


def _memory(found: Measurements) -> Check:
    if isinstance(found.run, Missing):
        return unmeasured("memory", found.run)
    if found.run.memory is None:
        return unmeasured("memory", Missing("the memory of the device is not known"))
    needed, free, line = found.run.memory
    mend = "`opdlab estimate` shows the parts: lower data.reuse.batch_size or model.max_tokens_per_pass"
    return checked("memory", needed / max(free, 1), line, mend)


def _time(found: Measurements) -> Check:
    for each in (found.run, found.speed):
        if isinstance(each, Missing):
            return unmeasured("time", each)
    run = found.run
    assert isinstance(run, ConfiguredRun)
    buffer = seconds_of_buffer(found)
    line = (
        f"about {buffer:.3g} s for a buffer of {run.rollouts} rollouts and its {run.epochs} passes, at the speeds "
        "measured here"
    )
    steps = run.rollouts * run.epochs / run.batch_size
    if run.num_steps is None:
        return checked("time", buffer / _HOUR, f"{line}; the number of steps is not bounded", "")
    hours = buffer * run.num_steps / steps / _HOUR
    mend = "take fewer steps, shorter answers, a smaller model, or another machine"
    return checked("time", hours, f"{line}; about {hours:.3g} h for {run.num_steps} optimizer steps", mend)


def seconds_of_buffer(found: Measurements) -> float:
    """Return the estimated seconds of a buffer: sampling, scoring by snapshot and teacher, and the passes over it."""
    assert isinstance(found.run, ConfiguredRun)
    assert not isinstance(found.speed, Missing)
    tokens = found.run.rollouts * found.lengths["student"].mean
    speed, passes = found.speed, 1 + _UPDATE * found.run.epochs
    return tokens / speed.sampled + tokens / speed.teacher_scored + passes * tokens / speed.student_scored
