"""The rows of opdlab's own scalars, registered like those of plug-ins; see :mod:`opdlab.diagnostics.metric_table`.

Letters: d drift, w weight of the gate, l position loss, c share of a position in the loss besides its weight, g norm of
the gradient of a position's loss at the student's last hidden state. Sums run over the valid positions of the step.
"""

from opdlab.diagnostics.metric_table import Chart, Metric, register_metric

_MODULE, _COLLECT = "opdlab.module.OPDModule", "opdlab.module.OPDModule.collect"
_STEP = "opdlab.diagnostics.training_metrics.step_metrics"
_SAMPLED, _SUPPORT = "opdlab.objectives.SampledTokenOPD", "opdlab.objectives.SupportDivergence"
_EFFECT, _AGES = "opdlab.diagnostics.gate_metrics.gate_tensors", "opdlab.diagnostics.run_history.age_scalars"
_COLLECTOR = "opdlab.rollouts.Collector.collect"
_ROUTED, _CACHE = "opdlab.policies.RoutedTeacher", "opdlab.policies.TargetCache"
_SERVED = "opdlab.policies.ServedTeacher"
_POSITIONS = "opdlab.diagnostics.positions.read_positions"
_GUARD = "opdlab.callbacks.CollapseGuard"
_SAMPLER = "opdlab.training.sampler_gap.corrected"
_BENCHMARK, _MEAN = (
    "opdlab.evaluation.benchmark_metrics.BenchmarkMetrics",
    "opdlab.evaluation.benchmark_metrics.over_benchmarks",
)

_LOSS = Chart("loss", "loss, gated and ungated")
_GAP = Chart("loss", "teacher gap, nats")
_MASS = Chart("loss", "support mass")
_DRIFT = Chart("drift", "drift, nats")
_WEIGHT = Chart("gate", "weight: mean, min, max", band=True)
_EXTREMES = Chart("gate", "share of weights below 0.5, above 2")
_CORRELATION = Chart("gate", "correlation of the weight with")
_UNGATED = Chart("gated against ungated step")
_JUDGED = Chart("rollout", "accuracy, truncated and repeated shares")

_DRIFT_ITEM = "drift {:.3f} (max {:.1f})"
_WEIGHTS_ITEM = "weights {:.2f}\N{EN DASH}{:.2f}"

# fmt: off
_ROWS = (
    # The optimizer batch: means over its valid positions, unless the meaning says otherwise.
    Metric("train/loss", "loss", "nats", "gated loss that is optimised; see `model.reduction`", _MODULE,
           "falls for LSM; around 0 and noisy for sampled-token, where its value says little",
           _LOSS, "loss {:.4f}"),
    Metric("train/drift/token_mean", "mean abs(drift)", "nats", "mean of abs(d), d = logpi - logpi_b", _STEP,
           "0 on the first minibatch after a refresh with a fresh buffer; 0.005 to 0.1 under reuse",
           _DRIFT, _DRIFT_ITEM),
    Metric("train/drift/segment_mean", "mean abs(segment drift)", "nats",
           "mean over positions of the absolute segment mean of d", _STEP,
           "at most `token_mean`; much lower where opposite drifts cancel", _DRIFT),
    Metric("train/drift/max", "largest drift", "nats", "largest abs(d)", _STEP,
           "below 1e-5 when fresh (float32); single tokens reach 15 to 20 under harsh reuse",
           Chart("drift"), _DRIFT_ITEM),
    Metric("train/drift/share_above_0.1", "share of positions with drift above 0.1", "share",
           "share of valid positions with abs(d) > 0.1 nats", _STEP, "below 0.2", Chart("drift")),
    Metric("train/teacher_gap", "teacher gap", "nats",
           "logq - logpi of the sampled token: teacher's log-probability less the student's", _STEP,
           "rises towards 0. On reused samples it can go *up* while the policy gets worse: judge by fresh rollouts",
           _GAP),
    Metric("train/advantage", "advantage", "nats",
           "sampled-token: advantage that the policy gradient uses; by default the teacher's log-probability of the "
           "sampled token less the reference policy's", _SAMPLED,
           "negative, rising towards 0; around 0 with a baseline", _GAP),
    Metric("train/baseline", "baseline", "nats",
           "sampled-token with `baseline: support_kl`: reverse KL of the student on the teacher's top K and one bucket "
           "for all other tokens", _SAMPLED, "falls towards 0", _GAP),
    Metric("train/reward_share", "reward's share of the advantage", "share",
           "sampled-token with `reward_weight`: mean of abs(reward) / (abs(reward) + abs(the rest of the advantage))",
           _SAMPLED, "below 0.5; rises as the student comes close to the teacher, falls to 0 where all verdicts of "
           "each prompt agree", Chart("loss")),
    Metric("train/entropy", "entropy", "nats", "entropy of the student's next-token distribution", _STEP,
           "falls slowly; a sudden fall to 0 is a collapse", Chart("loss")),
    Metric("train/teacher_support_mass", "teacher's support mass", "share",
           "teacher's probability of the support (for LSM its top K tokens)", _SUPPORT,
           "near 1; raise K if below 0.95", _MASS),
    Metric("train/student_support_mass", "student's support mass", "share",
           "student's probability of the support", _SUPPORT,
           "rises towards the teacher's. A fall is a leak: LSM does not see what lies outside the support, see the "
           "log of SmolLM2", _MASS),
    Metric("train/support_overlap", "overlap of the supports", "share",
           "share of the teacher's top K tokens that are also among the student's: with the union as support those of "
           "the snapshot that sampled; with the student's support the same, on two positions of each rollout; with "
           "the teacher's support those of the current student, on up to 256 positions of the steps that "
           "`gate_monitor` logs", _SUPPORT, "rises towards 1; below 0.5 the two hardly compare the same tokens",
           _MASS),
    Metric("train/top1_agreement", "top-1 agreement", "share",
           "share of positions at which student and teacher give the same token the highest probability; not with the "
           "student's support", _SUPPORT, "rises towards 1"),
    Metric("train/clip_share", "clip share", "share",
           "sampled-token: share of positions at which a PPO clip, dual clip included, leaves no gradient", _SAMPLED,
           "0 when fresh; below 0.2",
           Chart("loss")),

    Metric("train/teacher_entropy", "teacher's entropy", "nats",
           "entropy of the teacher's next-token distribution on the same positions: a lower bound from its support, or "
           "an estimate from the sampled tokens", _GUARD, "the student's comes close to it", Chart("loss")),

    # Where an engine sampled that gives log-probabilities of its own.
    Metric("train/sampler_gap", "difference to the sampler", "nats",
           "mean abs(logpi_b - logpi_s): the snapshot's log-probability of the sampled tokens less its sampler's own",
           _SAMPLER, "the rounding of both: below 1e-4 in float32. A run warns above 0.05", Chart("rollout")),
    Metric("train/sampler_gap_max", "largest difference to the sampler", "nats", "largest abs(logpi_b - logpi_s)",
           _SAMPLER),
    Metric("train/sampler_correction", "correction for the sampler", "",
           "mean factor of `model.sampler_correction`", _SAMPLER, "near 1", Chart("rollout")),
    Metric("train/sampler_correction_share", "share of corrections at the bound", "share",
           "share of positions at which the bound of `model.sampler_correction` acts: the factor is cut to it, or 0",
           _SAMPLER, "near 0"),

    Metric("rollout/demonstration_share", "share of demonstrations", "share",
           "share of the buffer's rollouts whose response comes from the data", _COLLECTOR,
           "`data.demonstrations.share`"),

    # Of the teachers, once per buffer.
    Metric("targets/<name>/share", "share of a teacher", "share", "share of the buffer's rollouts that it scores",
           _ROUTED, "as in the data"),
    Metric("targets/<name>/logprob", "log-probability under a teacher", "nats",
           "mean log-probability of the tokens that it scores", _ROUTED, "rises towards 0"),
    Metric("targets/<name>/seconds", "time of a teacher", "s", "time to load it and to score with it", _ROUTED),
    Metric("targets/<name>/cache_hits", "a teacher's targets from disk", "", "`targets/cache_hits` of this teacher",
           _ROUTED),
    Metric("targets/<name>/cache_misses", "a teacher's targets not on disk", "",
           "`targets/cache_misses` of this teacher", _ROUTED),
    Metric("targets/<name>/retries", "repeated requests to one of several teachers", "",
           "`targets/retries` of this teacher", _ROUTED, "0"),
    Metric("targets/<name>/request_seconds", "time of a request to one of several teachers", "s",
           "`targets/request_seconds` of this teacher", _ROUTED),
    Metric("targets/cache_hits", "targets from disk", "", "rollouts of the buffer whose targets were on disk", _CACHE,
           "0 for new responses; all demonstrations from the second pass over the prompts on"),
    Metric("targets/cache_misses", "targets not on disk", "", "rollouts of the buffer that the teacher has scored",
           _CACHE),
    Metric("targets/retries", "repeated requests to the teacher", "",
           "requests to the teacher's servers that were sent again for this buffer", _SERVED, "0"),
    Metric("targets/request_seconds", "time of a request to the teacher", "s",
           "mean time from sending a request to a teacher's server to having read its answer", _SERVED,
           "steady; rises with `model.teacher.concurrency` once the servers are busy"),

    # The gate's weights over the valid positions.
    Metric("gate/mean", "mean weight", "", "mean weight", _STEP,
           "1, except with `normalization: none`, where it falls with drift: the step shrinks by this factor", _WEIGHT),
    Metric("gate/min", "smallest weight", "", "smallest weight", _STEP, "1 when fresh", _WEIGHT, _WEIGHTS_ITEM),
    Metric("gate/max", "largest weight", "", "largest weight", _STEP, "1 when fresh", _WEIGHT, _WEIGHTS_ITEM),
    Metric("gate/std", "weight: standard deviation", "", "standard deviation of the weights", _STEP,
           "0 when fresh; below 0.1 with tau = 1 on the toy", Chart("gate")),
    Metric("gate/effective_sample_size", "effective sample size", "share", "(Σw)² / (N Σw²)", _STEP,
           "above 0.8; a low value means that few positions make the step", Chart("gate"), "ESS {:.2f}"),
    Metric("gate/share_below_0.5", "share of weights below 0.5", "share",
           "share of valid positions with weight below 0.5", _STEP, "small", _EXTREMES),
    Metric("gate/share_above_2", "share of weights above 2", "share",
           "share of valid positions with weight above 2", _STEP,
           "small: a mean of 1 raises the weights of undrifted positions where many have drifted", _EXTREMES),
    Metric("gate/tau", "tau", "1/nat", "tau of this step, where a schedule chooses it", _MODULE),

    # The gated step against the ungated one, from GateMonitor.
    Metric("gate/ungated_loss", "ungated loss", "nats", "Σ c l: what `train/loss` would be without the gate", _EFFECT,
           "as `train/loss`", _LOSS),
    Metric("gate/loss_ratio", "gated / ungated loss", "", "Σ c w l / Σ c l: gated over ungated loss", _EFFECT,
           "0.9 to 1 for LSM; lower: positions with a high loss have low weights. **Says little for sampled-token**, "
           "whose position losses have both signs: near a loss of 0 the ratio is any number, of either sign. Not "
           "written where the losses cancel to less than 1% of Σ c abs(l)", _UNGATED),
    Metric("gate/gradient_cosine", "cosine of the gradients", "",
           "Σ c²wg² / √(Σ c²w²g² · Σ c²g²): cosine between the gated and the ungated gradient at the last hidden "
           "states", _EFFECT,
           "1 when fresh; above 0.9. Low: few positions carry the gradient, and the gate has changed their order",
           _UNGATED),
    Metric("gate/gradient_norm_ratio", "gated / ungated gradient norm", "",
           "√(Σ c²w²g² / Σ c²g²): length of the gated gradient over that of the ungated", _EFFECT,
           "0.9 to 1.1. Weights have mean 1, but not over the positions that carry the gradient: where these have "
           "drifted, the gate shrinks the step after all", _UNGATED),
    Metric("gate/correlation/teacher_gap", "correlation of weight and teacher gap", "",
           "Pearson correlation of w and logq - logpi", _EFFECT,
           "positive where tokens that the teacher likes less have drifted more; -0.3 to 0.3", _CORRELATION),
    Metric("gate/correlation/position_loss", "correlation of weight and position loss", "",
           "Pearson correlation of w and l", _EFFECT,
           "-0.3 to 0; strongly negative: the gate mutes what is still to be learnt", _CORRELATION),

    # By the age of the rollouts, from GateMonitor.
    Metric("age/drift/<age>", "drift by steps since the refresh", "nats", "mean abs(d)", _AGES,
           "0 at age 0 (below 1e-5), growing with age; a sudden rise says how often the snapshot should be refreshed",
           Chart("age")),
    Metric("age/weight_std/<age>", "weight spread by steps since the refresh", "",
           "standard deviation of the weight", _AGES, "0 at age 0, growing with age", Chart("age")),
    Metric("age/weight_mean/<age>", "mean weight by steps since the refresh", "", "mean weight", _AGES,
           "1 where all rollouts of a step have one age, as they do unless the snapshot is refreshed within a buffer; "
           "differs from 1 only if ages are mixed, or with `normalization: none`", Chart("age")),
    Metric("reuse_epoch/drift/<epoch>", "drift by reuse epoch", "nats", "mean abs(d)", _AGES, "grows with the epoch",
           Chart("age")),
    Metric("reuse_epoch/weight_std/<epoch>", "weight spread by reuse epoch", "", "standard deviation of the weight",
           _AGES, "grows with the epoch", Chart("age")),
    Metric("reuse_epoch/weight_mean/<epoch>", "mean weight by reuse epoch", "", "mean weight", _AGES, "as by age",
           Chart("age")),

    # By position in the response, from GateMonitor: 32 bins, from 00 to 31.
    Metric("position/divergence/<bin>", "divergence by position", "nats",
           "mean divergence of the student from the teacher in each of 32 equal parts of a response: the objective's "
           "own, else `exp(r) - 1 - r` of the sampled token, r = logq - logpi", _POSITIONS,
           "falls everywhere; a rise along the response that grows from step to step says that the student leaves the "
           "teacher's path", Chart("position")),
    Metric("position/entropy/<bin>", "entropy by position", "nats",
           "mean entropy of the student's next-token distribution in each part of a response", _POSITIONS,
           "steady; near 0 at the end only: repetition", Chart("position")),
    Metric("position/teacher_gap/<bin>", "teacher gap by position", "nats",
           "mean of logq - logpi of the sampled token in each part of a response", _POSITIONS,
           "rises towards 0 everywhere", Chart("position")),
    Metric("position/weight/<bin>", "weight by position", "", "mean weight of the gate in each part of a response",
           _POSITIONS, "around 1; a slope says that the gate teaches the beginning or the end", Chart("position")),
    Metric("position/gradient_share/first_tenth", "gradient share of the first tenth", "share",
           "share of the squared gated gradient at the last hidden states that lies in the first tenth of each "
           "response: Σ c²w²g² over these positions, over that of all", _POSITIONS,
           "0.1 where all positions count alike; above 0.5 the first tokens make the step", Chart("position")),

    # The rollout buffer, and time.
    Metric("rollout/length", "length", "tokens", "mean length of the buffer's responses", _COLLECT, "steady",
           Chart("rollout")),
    Metric("rollout/accuracy", "accuracy", "share",
           "share of the buffer's sampled responses that the verifier accepts; only with gold answers", _COLLECT,
           "rises", _JUDGED),
    Metric("rollout/truncated_share", "truncated share", "share",
           "share of the buffer's responses that hit `max_new_tokens`", _COLLECT,
           "near 0; rises to 0.3 in collapsed runs", _JUDGED),
    Metric("rollout/repeated_share", "repeated 4-grams", "share",
           "share of the 4-grams of the buffer's sampled responses that repeat an earlier one of their response",
           _GUARD, "steady; rises towards 1 where responses run in circles", _JUDGED),
    Metric("rollout/reverse_kl", "reverse KL of the buffer", "nats",
           "mean of logpi_b - logq over the buffer's sampled responses: the snapshot's reverse KL to the teacher per "
           "token; biased below `top_p` 1", _GUARD, "falls towards 0", Chart("rollout")),
    Metric("rollout/age", "age", "steps",
           "mean optimizer steps since the snapshot that sampled the minibatch's rollouts took the student's weights",
           _MODULE, "0 to steps per buffer - 1 if each buffer begins with a refresh; with `data.reuse.overlap` as many "
           "steps more as a buffer has, from the second buffer on", Chart("rollout"), "age {:.3g}"),
    Metric("rollout/sampled_tokens_per_second", "sampling rate", "tokens/s",
           "response tokens sampled and scored by the snapshot per second, by all processes until the last is done",
           _COLLECT, "steady"),
    Metric("train/tokens_per_second", "training rate", "tokens/s",
           "response tokens that all processes train on per second since the last step ended, sampling and scoring "
           "included", _MODULE, "steady", None, "{} tok/s"),
    Metric("rollout/hidden_share", "hidden share of sampling", "share",
           "with `data.reuse.overlap`: share of the buffer's sampling time in which training did not wait for it, "
           "1 - `time/sample_wait_seconds` / `time/sample_seconds`; mean of the processes", _COLLECT,
           "0 for the first buffer; near 1 if a buffer's steps take longer than its sampling"),
    Metric("time/sample_seconds", "sampling time", "s",
           "time to sample the buffer, its scoring by the snapshot included; of the slowest process", _COLLECT),
    Metric("time/sample_wait_seconds", "wait for sampling", "s",
           "with `data.reuse.overlap`: time in which training waited for the buffer's rollouts; of the slowest process",
           _COLLECT),
    Metric("time/teacher_seconds", "teacher's time", "s",
           "time of the teacher's pass over the buffer; of the slowest process", _COLLECT),
    Metric("time/update_seconds", "update time", "s",
           "time of one optimizer step: forward, gate, backward, update. On an accelerator: until the work is queued",
           _MODULE),
    Metric("epoch", "epoch", "", "passes over the training prompts, counted by Lightning", "lightning.pytorch.Trainer"),

    # Evaluation.
    Metric("val/mean/pass@<k>", "pass@k, mean of the benchmarks", "share",
           "unweighted mean of pass@k over the benchmarks", _MEAN, "rises", Chart("validation")),
    Metric("val/<benchmark>/pass@<k>", "pass@k", "share",
           "unbiased estimate of the probability that at least one of k answers is right (Chen et al. 2021), mean "
           "over problems", _BENCHMARK,
           "rises. Large k says what the model can do at all, k = 1 what it does: pass@1 up and pass@n down is a loss "
           "of diversity", Chart("validation")),
    Metric("val/<benchmark>/avg@<n>", "avg@n", "share",
           "share of right answers among the n to a problem, mean over problems: the same as pass@1", _BENCHMARK,
           "rises"),
    Metric("val/<benchmark>/maj@<n>", "maj@n", "share",
           "share of problems whose most frequent extracted answer is right. Answers are compared as text; those from "
           "which nothing was extracted do not vote; where several are equally frequent, one is drawn at random and "
           "the expectation counts; a problem without votes counts as 0. Left out if nothing was extracted at all",
           _BENCHMARK,
           "mostly above pass@1; below it, the model is wrong in one and the same way"),
    Metric("val/<benchmark>/truncated", "truncated", "share", "share of answers that hit `max_new_tokens`", _BENCHMARK,
           "near 0; above 0.1 the other metrics say more of the limit than of the model"),
    Metric("val/<benchmark>/boxed", "boxed", "share",
           r"share of answers with a complete `\boxed{…}`, right or wrong", _BENCHMARK,
           "near 1 where the prompt asks for it; low: the format and not the mathematics fails"),
    Metric("val/<benchmark>/length", "length", "tokens", "mean length of an answer, its stop token included",
           _BENCHMARK, "steady; a rise together with `truncated` is a loop", Chart("validation")),
    Metric("val/<benchmark>/reverse_kl", "reverse KL", "nats",
           "mean of logpi - logq over the tokens of fresh samples: the reverse KL to the teacher per token. With "
           "`model.evaluation.reverse_kl`; unbiased at `top_p` 1", _BENCHMARK, "falls towards 0"),
    Metric("val/<benchmark>/<metric>_se", "standard error", "",
           "standard error of a metric over the problems, in its unit", _BENCHMARK),
    Metric("val/mean/<metric>", "mean of the benchmarks", "",
           "unweighted mean of a metric over the benchmarks, or the standard error of that mean", _MEAN),
    Metric("teacher/<benchmark or mean>/<metric>", "the teacher's", "",
           "the teacher's metrics, as under `val/`; logged when training ends", _BENCHMARK),
    Metric("teacher-<teacher>/<benchmark or mean>/<metric>", "each teacher's", "",
           "the metrics of each teacher of a RoutedTeacher, as under `val/`; logged when training ends", _BENCHMARK),
)
# fmt: on

for _row in _ROWS:
    register_metric(_row)
