"""Whole training runs with and without `react_fast.patch`: `python -m bench.integration_runs [--turns 3] [--out]`.

The same seeds; every run in a process of its own, both by turns, one thread. Seconds are of the training alone,
with REACT_FAST_BENCH_CLOCK=cpu the processor's, for a machine that others use too; peak memory is the process's.
Every number that a trainer logs is compared step by step; the largest difference is of the metric's largest value
over the run. `--out` writes bench/results/integration_runs.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import react_fast as rf

from .common import now
from .integrations import heading
from .memory import _peak
from .report import RESULTS

# What a trainer logged, step by step.
Log = list[dict[str, float]]
PACKAGES = ("transformers", "trl", "stable-baselines3", "torchrl", "tensordict", "gymnasium")


def _trl(kind: str, **options: Any) -> Callable[[], Log]:
    """Four steps of 8 completions (4 pairs for DPO) of a Qwen2 of width 256 with 32 000 tokens, from scratch."""
    import trl
    from datasets import Dataset

    from .grpo_step import _policy, _texts

    model, tokenizer = _policy(32_000)
    config = getattr(trl, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(), max_steps=4, learning_rate=1e-4, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        log_level="error", seed=0, **options,
    )  # fmt: skip
    rows: list[dict[str, str]] = [{"prompt": text} for text in _texts()]
    own: dict[str, Any] = {
        "reward_funcs": lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids]
    }
    if kind == "DPO":
        words = " ".join(_texts()).split()
        rows = [
            {**row, "chosen": " ".join(words[i : i + 30]), "rejected": " ".join(words[i + 7 : i + 40])}
            for i, row in enumerate(rows)
        ]
        own = {"ref_model": _policy(32_000)[0]}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **own
    )

    def train() -> Log:
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    return train


# A batch is trained on twice: at the first time a ratio is 1 and the loss 0.
SAMPLED = {
    "num_iterations": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 32,
}


def _sb3(kind: str, steps: int, **options: Any) -> Callable[[], Log]:
    """CartPole, eight environments."""
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import KVWriter, Logger

    found: Log = []

    class Kept(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
            found.append({name: float(x) for name, x in key_values.items()})

    model = getattr(stable_baselines3, kind)(
        "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), seed=0, device="cpu", **options
    )
    model.set_logger(Logger(None, [Kept()]))
    return lambda: model.learn(steps, log_interval=1) and found


def torchrl_ppo(batches: int = 4, frames: int = 1024, epochs: int = 4, size: int = 256) -> Callable[[], Log]:
    """CartPole by torchrl's collector, GAE and ClipPPOLoss."""
    from tensordict.nn import TensorDictModule
    from torch.distributions import Categorical
    from torchrl.collectors import Collector
    from torchrl.envs import GymEnv, TransformedEnv
    from torchrl.envs.transforms import RewardSum
    from torchrl.modules import ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.manual_seed(0)

    def network(outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, outputs))

    env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), RewardSum())
    env.set_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(network(2), ["observation"], ["logits"]),
        in_keys=["logits"], distribution_class=Categorical, return_log_prob=True, spec=env.action_spec,
    )  # fmt: skip
    critic = ValueOperator(network(1), in_keys=["observation"])
    advantage, loss = GAE(gamma=0.99, lmbda=0.95, value_network=critic), ClipPPOLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    collector = Collector(env, actor, frames_per_batch=frames, total_frames=batches * frames)

    def step(data: Any) -> dict[str, float]:
        losses = loss(data)
        total = sum(losses[name] for name in ("loss_objective", "loss_critic", "loss_entropy"))
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
        optimizer.step()
        return {"loss": float(total.detach()), "grad_norm": float(norm)}

    def train() -> Log:
        found: Log = []
        for data in collector:
            for _ in range(epochs):
                advantage(data)
                order = torch.randperm(frames)
                found += [step(data[chosen]) for chosen in order.split(size)]
            found.append({"reward": float(data["next", "episode_reward"].max())})
        collector.shutdown()
        return found

    return train


RUNS: dict[str, tuple[str, Callable[[], Callable[[], Log]]]] = {
    "TRL GRPO": ("trl", lambda: _trl("GRPO", **SAMPLED)),
    "TRL RLOO": ("trl", lambda: _trl("RLOO", beta=0.0, **SAMPLED)),
    "TRL DPO": ("trl", lambda: _trl("DPO", per_device_train_batch_size=4)),
    "Stable-Baselines3 PPO": ("stable_baselines3", lambda: _sb3("PPO", 8192, n_steps=256, n_epochs=4)),
    "Stable-Baselines3 A2C": ("stable_baselines3", lambda: _sb3("A2C", 8000, n_steps=16)),
    "torchrl PPO": ("torchrl", torchrl_ppo),
}
# Of the clock, not of the training.
_CLOCKS = ("time", "runtime", "per_second", "fps")


def one(name: str, patched: bool) -> dict[str, Any]:
    """Seconds, peak memory in MiB and metrics of a run in this process."""
    torch.set_num_threads(1)
    package, prepare = RUNS[name]
    if patched:
        rf.patch(package)
    train = prepare()
    start = now()
    log = train()
    seconds = now() - start
    kept = [{key: x for key, x in row.items() if not any(word in key for word in _CLOCKS)} for row in log]
    return {"seconds": seconds, "peak": _peak() / 2**20, "log": kept}


def largest_difference(theirs: Log, ours: Log) -> tuple[float, str]:
    """The largest difference of any metric in any step, of the metric's largest value, and the metric's name."""
    if [row.keys() for row in theirs] != [row.keys() for row in ours]:
        return float("inf"), "other metrics"
    scales: dict[str, float] = {}
    for row in theirs:
        for key, x in row.items():
            scales[key] = max(scales.get(key, 0.0), abs(x), 1e-30)
    found = [
        (abs(ours[i][key] - x) / scales[key], key)
        for i, row in enumerate(theirs)
        for key, x in row.items()
        if x == x or ours[i][key] == ours[i][key]  # nan where there is nothing to say, in both
    ]
    return max(found)


def _apart(name: str, patched: bool) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench.integration_runs", "--one", name]
    done = subprocess.run(
        command + ["--patched"] * patched, check=True, capture_output=True, text=True, timeout=900
    )
    return json.loads(done.stdout.splitlines()[-1])


TITLES = (
    "| run | without, s | with, s | ratio | without, MiB | with, MiB | largest difference |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)


def rows(names: Sequence[str], turns: int) -> Iterator[str]:
    for name in names:
        pairs = [(_apart(name, False), _apart(name, True)) for _ in range(turns)]
        seconds, peaks = (
            [statistics.median(x[key] for x in side) for side in zip(*pairs, strict=True)]
            for key in ("seconds", "peak")
        )
        far, metric = max(largest_difference(a["log"], b["log"]) for a, b in pairs)
        yield (
            f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {seconds[0] / seconds[1]:.2f}x "
            f"| {peaks[0]:.0f} | {peaks[1]:.0f} | {far:.1e} ({metric}) |\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", action="store_true")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--patched", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.patched)))
        return
    text = heading(f"Training with and without the patch, turns: {arguments.turns}", PACKAGES) + TITLES
    print(text, end="")
    for row in rows(arguments.only, arguments.turns):
        print(row, end="", flush=True)
        text += row
        if arguments.out:
            (RESULTS / "integration_runs.md").write_text(text)


if __name__ == "__main__":
    main()
