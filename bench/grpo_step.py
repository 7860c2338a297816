"""A whole GRPO step beside TRL's GRPOTrainer: `python -m bench.grpo_step [--vocab 32000] [--threads 1]`.

One Qwen2-style model (4 layers, width 256), the same prompts, lengths and batch, float32 on CPU. Both trainers
live in one process and take turns step by step: ours runs in a callback of TRL's. TRL is as its documentation has
it, but for gradient checkpointing, which is off for both. The limit is the model's forward and backward with the
head, the loss, the gradient's norm and AdamW, as plain calls on a step's batch. Peak memory is of processes of
their own. Writes bench/results/grpo_step.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import set_seed

from react_fast import GRPO, Trainer
from react_fast.envs import Record, TextEnv
from react_fast.trainer.config import TrainerConfig
from react_fast.trainer.model import fresh_model

from .memory import _peak, _resident, _start_over
from .report import RESULTS

PROMPTS, GROUP, LENGTH, PROMPT_WORDS = 2, 8, 64, 64
OURS, TRL = "react_fast", "TRL GRPOTrainer"
_WORDS = (
    "amber",
    "brook",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "harbor",
    "island",
    "jungle",
    "knoll",
)


def _texts() -> list[str]:
    return [
        " ".join(_WORDS[(i * 7 + j * (i + 1)) % len(_WORDS)] for j in range(PROMPT_WORDS)) for i in range(8)
    ]


def _vowels(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / 64


def _policy(vocab: int) -> tuple[Any, Any]:
    """The same weights at every call; token ids above the tokenizer's are texts without letters."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    _, tokenizer = fresh_model(_texts(), vocab_size=400, hidden_size=16, layers=1, heads=2)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(0)
    return AutoModelForCausalLM.from_config(config), tokenizer


@dataclass
class Steps:
    """Seconds of every step, of its generation, and tokens that it trained on."""

    whole: list[float] = field(default_factory=list)
    generation: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def rest(self) -> list[float]:
        return [whole - part for whole, part in zip(self.whole, self.generation, strict=True)]


def _timed(owner: Any, name: str) -> Callable[[], float]:
    """Times calls of a method; returns what tells, and forgets, the seconds so far."""
    seconds, call = [0.0], getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - start

    setattr(owner, name, timed)

    def told() -> float:
        found, seconds[0] = seconds[0], 0.0
        return found

    return told


class _Ours:
    def __init__(self, vocab: int, threads: int) -> None:
        model, tokenizer = _policy(vocab)
        records = [Record(text) for text in _texts()]
        config = TrainerConfig(
            steps=1000, prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=LENGTH, learning_rate=1e-6,
            threads=threads,
        )  # fmt: skip
        env = TextEnv(records, reward=lambda state, action, record: _vowels(action))
        self.trainer = Trainer(model, tokenizer, env, algorithm=GRPO(), config=config)
        self.steps, self._generation = Steps(), _timed(self.trainer.engine, "generate")
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def step(self) -> None:
        start = time.perf_counter()
        metrics = self.trainer.train_step()
        self.steps.whole.append(time.perf_counter() - start)
        self.steps.generation.append(self._generation())
        self.steps.tokens.append(int(metrics["tokens"]))

    def limit(self) -> float:
        """Seconds of the update on a step's batch as plain calls."""
        import react_fast as rf

        trainer = self.trainer
        batch = trainer.credit(trainer.score(trainer.collect()))
        self._generation()
        start = time.perf_counter()
        hidden = trainer.model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        logprobs = rf.linear_token_logprobs(
            hidden[:, :-1], trainer.model.lm_head.weight, batch.input_ids[:, 1:], mask=batch.mask
        )
        loss, _ = rf.policy_loss(logprobs, logprobs.detach(), batch.advantages, batch.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        found = time.perf_counter() - start
        return found


def _trl(vocab: int, steps: int, after_step: Callable[[], None]) -> Steps:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = _policy(vocab)
    found, start = Steps(), [0.0]

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            start[0] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.whole.append(time.perf_counter() - start[0])
            found.generation.append(generation())
            found.tokens.append(tokens[0])
            after_step()

    tokens = [0]

    def reward(
        prompts: Any, completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        tokens[0] = sum(map(len, completion_ids))
        return [_vowels(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=LENGTH, max_steps=steps, learning_rate=1e-6, lr_scheduler_type="constant",
            logging_steps=1, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True, log_level="error",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in _texts()]),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        generation = _timed(trainer, "_generate")
        trainer.train()
    return found


def _race(vocab: int, threads: int, steps: int) -> dict[str, Any]:
    """Both by turns; the first step of each, which allocates, is left out."""
    torch.set_num_threads(threads)
    ours = _Ours(vocab, threads)
    limits: list[float] = []

    def turn() -> None:
        ours.step()
        limits.append(ours.limit())

    trl = _trl(vocab, steps + 1, turn)
    return {
        name: {
            "tokens": statistics.median(found.tokens[1:]),
            "whole": found.whole[1:],
            "rest": found.rest()[1:],
            "generation": found.generation[1:],
        }
        for name, found in ((OURS, ours.steps), (TRL, trl))
    } | {"limit": limits[1:]}


def _memory(name: str, vocab: int, threads: int) -> int:
    """Bytes of two steps beyond what imports take: model, gradients, optimizer state, activations."""
    torch.set_num_threads(threads)
    import datasets  # noqa: F401
    import trl  # noqa: F401

    _start_over()
    before = _resident()
    if name == OURS:
        ours = _Ours(vocab, threads)
        ours.step()
        ours.step()
    else:
        _trl(vocab, 2, lambda: None)
    return max(0, _peak() - before)


def _row(vocab: int, threads: int, found: dict[str, Any], memory: dict[str, int]) -> str:
    middle = statistics.median
    ours, trl, limit = found[OURS], found[TRL], middle(found["limit"])
    ratio = {part: middle(trl[part]) / middle(ours[part]) for part in ("whole", "rest", "generation")}
    speed = [x["tokens"] / middle(x["whole"]) for x in (ours, trl)]
    overhead = (middle(ours["rest"]) - limit) / middle(ours["whole"])
    mib = [memory[name] / 2**20 for name in (OURS, TRL)]
    return (
        f"| {vocab:,} | {threads} | {speed[0]:.0f} | {speed[1]:.0f} | {ratio['whole']:.2f}x | {ratio['rest']:.2f}x"
        f" | {ratio['generation']:.2f}x | {middle(ours['whole']):.2f} s | {limit:.2f} s | {overhead:.1%}"
        f" | {mib[0]:.0f} | {mib[1]:.0f} | {mib[0] / mib[1]:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(_memory(arguments.memory, arguments.vocab[0], arguments.threads[0])))
        return
    lines = [
        f"# A GRPO step: {PROMPTS * GROUP} responses of {LENGTH} tokens, {PROMPT_WORDS}-word prompts",
        "",
        f"Medians of {arguments.steps} steps by turns; TRL {version('trl')}, torch {torch.__version__}, float32.",
        "Ratios are TRL's time over ours, and our peak over TRL's. Overhead: what is neither generation nor the",
        "limit (forward, head, loss, backward, clipping and AdamW as plain calls), of the whole step.",
        "",
        "| vocabulary | threads | ours tokens/s | TRL tokens/s | step | without generation | generation | our step"
        " | limit | overhead | our peak MiB | TRL's | memory |",
        "|" + " ---: |" * 13,
    ]
    for vocab in arguments.vocab:
        for threads in arguments.threads:
            found = _race(vocab, threads, arguments.steps)
            memory = {}
            for name in (OURS, TRL):
                words = ["--memory", name, "--vocab", str(vocab), "--threads", str(threads)]
                done = subprocess.run(
                    [sys.executable, "-m", "bench.grpo_step", *words],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                memory[name] = int(done.stdout.splitlines()[-1])
            lines.append(_row(vocab, threads, found, memory))
            print(lines[-1], flush=True)
    (RESULTS / "grpo_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
