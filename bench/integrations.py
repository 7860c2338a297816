"""Other trainers with and without `react_fast.patch`: `python -m bench.integrations [PART ...]`, else all.

Both by turns in one process, one thread; medians and their ratio are printed. `step` is the GRPOTrainer of
bench.grpo_step with the patch on in every second step, and rewards that differ, since rows without advantage cost
ours no backward.
"""

import argparse
import importlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

import react_fast as rf

from .common import CLOCK, SAMPLE_SECONDS, now
from .grpo_step import GROUP, LENGTH, PROMPTS, _policy, _texts, _timed
from .report import RESULTS

Row = tuple[str, float, float]


def _seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def _race(theirs: Callable[[], Any], ours: Callable[[], Any], turns: int) -> tuple[float, float]:
    """Medians of samples by turns; what is quick is repeated within a sample, as in every benchmark here."""
    calls = (theirs, ours)
    repeats = [math.ceil(SAMPLE_SECONDS / max(_seconds(call), _seconds(call), 1e-6)) for call in calls]
    times = [[_seconds(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(turns)]
    first, second = zip(*times, strict=True)
    return statistics.median(first), statistics.median(second)


def head(vocab: int, turns: int) -> Iterator[Row]:
    """TRL's fused head, forward and backward: 16 rows, prompts of 104 tokens, completions of 64, width 256."""
    from trl.trainer.utils import add_fused_lm_head

    model, _ = _policy(vocab)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.model.forward = lambda inputs_embeds, **_: type("Out", (), {"last_hidden_state": inputs_embeds})
    hidden = torch.randn(PROMPTS * GROUP, 104 + LENGTH, 256, requires_grad=True)
    labels = torch.randint(0, vocab, hidden.shape[:2])
    labels[:, :104] = -100

    def step() -> None:
        model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).log_probs.sum().backward()

    times: list[tuple[float, float]] = []
    for _ in range(turns + 1):
        theirs = _seconds(step)
        with rf.patch("trl"):
            times.append((theirs, _seconds(step)))
    first, second = zip(*times[1:], strict=True)
    yield f"TRL's fused LM head, V {vocab:,}", statistics.median(first), statistics.median(second)


def step(vocab: int, turns: int) -> Iterator[Row]:
    """A whole GRPOTrainer step, and the same without generation."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = _policy(vocab)
    whole: tuple[list[float], list[float]] = [], []
    rest: tuple[list[float], list[float]] = [], []

    class Watch(TrainerCallback):
        number, start = 0, 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            (rf.patch if self.number % 2 else rf.unpatch)("trl")
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds, generated = time.perf_counter() - self.start, generation()
            if self.number > 1:  # the first two allocate
                whole[self.number % 2].append(seconds)
                rest[self.number % 2].append(seconds - generated)
            self.number += 1

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=LENGTH, max_steps=2 * turns + 2, learning_rate=1e-6, report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            log_level="error", logging_strategy="no",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in _texts()]),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        generation = _timed(trainer, "_generate")
        trainer.train()
    for name, (theirs, ours) in (("a GRPOTrainer step", whole), ("the same without generation", rest)):
        yield f"{name}, V {vocab:,}", statistics.median(theirs), statistics.median(ours)


def torchrl(vocab: int, turns: int) -> Iterator[Row]:
    import torchrl.objectives.value.functional as place

    names = ("generalized_advantage_estimate", "vec_generalized_advantage_estimate")
    for rows, steps in ((64, 1024), (64, 8192)):
        values, after, rewards = torch.randn(3, rows, steps, 1)
        done = torch.rand(rows, steps, 1) < 0.01
        for name in names:
            with rf.patch("torchrl"):
                ours = getattr(place, name)
            theirs = getattr(place, name)
            given = 0.99, 0.95, values, after, rewards, done, done
            found = _race(lambda f=theirs, x=given: f(*x), lambda f=ours, x=given: f(*x), turns)  # type: ignore[misc]
            yield f"torchrl's {name} [{rows}, {steps}]", *found


def sb3(vocab: int, turns: int) -> Iterator[Row]:
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer as Theirs

    from react_fast.integrations.stable_baselines3 import RolloutBuffer as Ours

    space = spaces.Box(-1, 1, (1,))
    for steps, envs in ((2048, 1), (2048, 8), (2048, 64)):
        buffers = []
        for kind in (Theirs, Ours):
            buffer = kind(steps, space, space, device="cpu", n_envs=envs)
            numbers = np.random.default_rng(0)
            buffer.rewards[:], buffer.values[:] = numbers.normal(size=(2, steps, envs))
            buffer.episode_starts[:] = numbers.random((steps, envs)) < 0.01
            buffers.append(buffer)
        last, dones = torch.zeros(envs, 1), np.zeros(envs, dtype=bool)
        theirs, ours = (
            lambda b=buffer, x=last, d=dones: b.compute_returns_and_advantage(x, d)  # type: ignore[misc]
            for buffer in buffers
        )
        yield f"Stable-Baselines3's advantages [{steps}, {envs}]", *_race(theirs, ours, turns)


def replay(vocab: int, turns: int) -> Iterator[Row]:
    """A batch sampled and its priorities updated, of 1e6 entries."""
    import numpy as np
    from tianshou.data.utils.segtree import SegmentTree

    flags = sys.getdlopenflags()
    sys.setdlopenflags(
        os.RTLD_LAZY
    )  # the wheel misses a symbol of some torch versions, which its trees do not call
    importlib.import_module("torchrl._torchrl")
    sys.setdlopenflags(flags)
    from torchrl.data import ListStorage, PrioritizedSampler

    size = 10**6
    numbers = np.random.default_rng(0)
    priorities = numbers.exponential(size=size)
    ours, tianshou = rf.SumTree(size), SegmentTree(size)
    ours.update(np.arange(size), priorities)
    tianshou[np.arange(size)] = priorities
    sampler = PrioritizedSampler(size, alpha=1.0, beta=0.4, eps=0.0, dtype=torch.float64)
    storage = ListStorage(size)
    storage._storage = range(size)  # its length is all that is read
    sampler.extend(torch.arange(size))
    sampler.update_priority(torch.arange(size), torch.from_numpy(priorities))
    for batch in (32, 256):
        values = numbers.exponential(size=batch)
        tensor = torch.from_numpy(values)

        def torchrl_s(batch: int = batch, values: torch.Tensor = tensor) -> None:
            indices, _ = sampler.sample(storage, batch)
            sampler.update_priority(indices, values)

        def tianshou_s(batch: int = batch, values: np.ndarray = values) -> None:
            indices = tianshou.get_prefix_sum_idx(numbers.random(batch) * tianshou.reduce())
            tianshou[indices] = values

        def mine(batch: int = batch, values: np.ndarray = values) -> None:
            indices, found = ours.sample(numbers.random(batch))
            ours.least / found  # the weights, which torchrl's sampler computes, too
            ours.update(indices, values)

        for label, theirs in (
            ("torchrl's PrioritizedSampler", torchrl_s),
            ("Tianshou's SegmentTree", tianshou_s),
        ):
            yield f"{label}, {batch} of 1e6", *_race(theirs, mine, turns)


def verl(vocab: int, turns: int) -> Iterator[Row]:
    import numpy as np
    import verl.trainer.ppo.core_algos as place

    rows, steps = 64, 1024
    rewards, values = torch.randn(2, rows, steps)
    mask = (torch.arange(steps) < torch.randint(1, steps + 1, (rows, 1))).long()
    uids = np.array([f"uid-{i // 8}" for i in range(1024)], dtype=object)
    given: dict[str, tuple[Any, ...]] = {
        "compute_gae_advantage_return": (rewards, values, mask, 0.99, 0.95),
        "compute_grpo_outcome_advantage": (torch.randn(1024, 256), torch.ones(1024, 256).long(), uids),
    }
    for name, x in given.items():
        with rf.patch("verl"):
            ours = getattr(place, name)
        theirs = getattr(place, name)
        found = _race(lambda f=theirs, x=x: f(*x), lambda f=ours, x=x: f(*x), turns)  # type: ignore[misc]
        yield f"verl's {name} {list(x[0].shape)}", *found


# With turns; `replay` first, since it says how torchrl's binary is loaded.
PARTS = {
    "replay": (replay, 51), "head": (head, 3), "step": (step, 4), "torchrl": (torchrl, 9), "sb3": (sb3, 15),
    "verl": (verl, 15),
}  # fmt: skip


def heading(title: str, packages: Sequence[str]) -> str:
    """A result file's first lines: what was measured where."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    clock = "processor time" if CLOCK == "cpu" else "wall time"
    return f"# {title}\n\n{date.today()}, commit {commit.strip()}, one thread, {clock}, {versions}.\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--out", action="store_true", help="write bench/results/integrations.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"PART must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    peers = ("trl", "torchrl", "stable-baselines3", "tianshou", "verl")
    text = heading("Calls with and without the patch", peers)
    text += "| what | without, ms | with, ms | ratio |\n| --- | ---: | ---: | ---: |\n"
    print(text, end="")
    for name in sorted(arguments.parts, key=list(PARTS).index) or PARTS:
        part, turns = PARTS[name]
        for label, theirs, ours in part(arguments.vocab, turns):
            row = f"| {label} | {theirs * 1e3:.3g} | {ours * 1e3:.3g} | {theirs / ours:.1f}x |\n"
            print(row, end="", flush=True)
            text += row
    if arguments.out:
        (RESULTS / "integrations.md").write_text(text)


if __name__ == "__main__":
    main()
