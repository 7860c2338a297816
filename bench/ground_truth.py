"""Does the tracker find known causes, and are its intervals and discoveries worth their names?

    python -m bench.ground_truth [--repeats 1000]

Texts of an environment with a known structural causal model (react_fast.envs.slots). Every slot of every
text is set to neutral and the reward re-rolled under the same noise. Writes bench/results/ground_truth.md.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from react_fast.envs.slot_models import Observer, Writer
from react_fast.envs.slots import GroundTruth, ground_truth
from react_fast.tracker import CausalityTracker, Effects, Replacement
from react_fast.tracker.statistics import CORRECTIONS, auroc, bootstrap_interval

from .report import RESULTS

SAMPLES = 12  # re-rolled responses of every action and of its control
GROUP = 20  # texts that one ranking of the slots is made from


@dataclass(frozen=True)
class Trial:
    """One text: the measured effect of setting each slot to neutral, its true value, and the attribution."""

    effects: Effects
    truth: np.ndarray
    attribution: np.ndarray


def trials(truth: GroundTruth, count: int, *, samples: int = SAMPLES, seed: int = 0) -> Iterator[Trial]:
    """`count` texts in turn with U = 0 and 1, each written, attributed and intervened on anew."""
    rng = np.random.default_rng(seed)
    writer, observer = Writer(truth), CausalityTracker(Observer(truth))
    actions = [(i, i + 1) for i in range(1, truth.slots + 1)]
    for repeat in range(count):
        hidden = repeat % 2
        text = truth.write(rng, hidden)
        prompt, response = truth.encode(truth.prompt(hidden)), truth.encode(text)

        def reward(ids: list[int], hidden: int = hidden) -> float:
            return truth.reward(truth.decode(ids), hidden, rng)

        tracker = CausalityTracker(writer, interventions=Replacement(truth.neutral_id), seed=seed + repeat)
        effects = tracker.intervene(prompt, response, actions, reward, samples)
        neutral = truth.decode([truth.neutral_id])
        expected = [
            truth.value(text[: i + 1], hidden) - truth.value(text[:i] + neutral, hidden)
            for i in range(truth.slots)
        ]
        found = observer.attribute(prompt, response, lambda logits: logits[-1, 0])
        yield Trial(effects, np.array(expected), found.scores[1:].numpy())


def recovery(
    truth: GroundTruth, found: Sequence[Trial], *, group: int = GROUP
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of the causes, by intervention and by attribution: [groups] each; slots ranked by the size of the mean
    effect, and by the mean size of the attribution, over the texts of a group."""
    causes = np.array(truth.kinds) == "cause"
    groups = [found[i : i + group] for i in range(0, len(found) - group + 1, group)]
    measured = [auroc(np.abs(np.mean([t.effects.mean.numpy() for t in g], 0)), causes) for g in groups]
    observed = [auroc(np.mean([np.abs(t.attribution) for t in g], 0), causes) for g in groups]
    return np.array(measured), np.array(observed)


def coverage(found: Sequence[Trial]) -> dict[str, float]:
    """Share of the 95% intervals that hold the true effect, by kind of interval."""
    truth = np.array([t.truth for t in found])
    student = [np.array([getattr(t.effects, side).numpy() for t in found]) for side in ("low", "high")]
    bootstrap = bootstrap_interval(np.array([t.effects.values.numpy() for t in found]))
    return {
        name: float(np.mean((low <= truth) & (truth <= high)))
        for name, (low, high) in (("student_t", student), ("bootstrap", bootstrap))
    }


def discoveries(found: Sequence[Trial]) -> dict[str, tuple[float, float]]:
    """(share of the actions, share of the texts with any) that are called significant, by correction."""
    p_values = [t.effects.p_value.numpy() for t in found]
    tests = {"none": lambda p: p <= 0.05, **CORRECTIONS}
    rejected = {name: np.array([test(p) for p in p_values]) for name, test in tests.items()}
    return {name: (float(hit.mean()), float(hit.any(1).mean())) for name, hit in rejected.items()}


def table(truth: GroundTruth, found: Sequence[Trial], silent: Sequence[Trial], seconds: float) -> str:
    """Markdown."""
    kinds = {kind: truth.kinds.count(kind) for kind in ("cause", "confounded", "noise")}
    measured, observed = recovery(truth, found)
    lines = [
        f"{len(found)} texts of {truth.slots} slots ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
        f"{SAMPLES} re-rolled responses of every action, {len(measured)} rankings of {GROUP} texts; "
        f"reward noise {truth.noise:g}, a cause pays 1, the hidden confounder {truth.direct:g}. "
        f"{seconds:.0f} s on {torch.get_num_threads()} thread.",
        "",
        "| what | found | wanted |",
        "| --- | --- | --- |",
        f"| AUROC of the causes by intervention, mean (least) | {measured.mean():.3f} ({measured.min():.3f}) "
        "| at least 0.95 |",
        f"| AUROC of the causes by attribution (gradient x input of the observer) | {observed.mean():.3f} "
        f"({observed.min():.3f}) | fooled by the confounded |",
    ]
    lines += [
        f"| 95% intervals that hold the true effect, {name} | {100 * share:.1f}% | 93 to 97% |"
        for name, share in coverage(found).items()
    ]
    lines += [
        f"| no effect anywhere: actions called significant, correction {name} "
        f"(texts with any) | {100 * actions:.2f}% ({100 * texts:.1f}%) | {wanted} |"
        for (name, (actions, texts)), wanted in zip(
            discoveries(silent).items(), ("5%, for comparison", "at most 5%", "at most 5%"), strict=True
        )
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ground_truth")
    parser.add_argument("--repeats", type=int, default=1000)
    given: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    truth = ground_truth()
    found = list(trials(truth, given.repeats))
    silent = list(trials(ground_truth(weight=0.0), given.repeats, seed=1_000_000))
    text = table(truth, found, silent, time.perf_counter() - begin)
    (RESULTS / "ground_truth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
