"""Updates of a freshly initialised model of 0.5B parameters: ours, with the tracker on, plain torch, and TRL's.

bfloat16, attention through torch's SDPA, sequences of 2048 tokens that are given, so that everyone trains on the
same and nobody generates: `python -m bench.gpu.training NAME` for one contestant, in a process of its own.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import react_fast as rf

from ..common import DEVICE, now, wait
from . import process
from .events import brief, left, log, rehearsing, tell

TINY = rehearsing()
PROMPTS, GROUP, PROMPT, LENGTH = (2, 2, 8, 24) if TINY else (2, 4, 512, 2048)
ROWS, STEPS = PROMPTS * GROUP, 1 if TINY else 5
# Qwen2.5-0.5B's config.json on the Hugging Face hub.
SIZES: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
if TINY:
    SIZES |= {"vocab_size": 500, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
DTYPE = torch.float32 if TINY else torch.bfloat16
Step = Callable[[], object]


def _model() -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, max_position_embeddings=2 * LENGTH, tie_word_embeddings=True)
    with torch.device(DEVICE):  # drawing half a billion numbers takes a CPU seconds
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(DTYPE)


def _ids() -> torch.Tensor:
    """[ROWS, LENGTH]; rows of a group begin with the same prompt."""
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 400, (PROMPTS, PROMPT), generator=draw).repeat_interleave(GROUP, 0)
    return torch.cat([prompts, torch.randint(3, 400, (ROWS, LENGTH - PROMPT), generator=draw)], 1)


def _reward(row: int) -> float:
    return float((7 * row) % 5)


def loop(logprobs: Callable[..., torch.Tensor], loss: Callable[..., torch.Tensor]) -> tuple[Any, Step]:
    """(model, an update): log-probs of the responses, GRPO's loss, backward, clipping, AdamW, as plain calls."""
    model, ids = _model(), _ids().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    advantages = torch.tensor([_reward(i) for i in range(ROWS)], device=DEVICE)
    advantages -= advantages.mean()
    mask = torch.ones(ROWS, LENGTH - PROMPT, dtype=torch.bool, device=DEVICE)

    def step() -> None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
        logp = logprobs(hidden, model.lm_head.weight, ids[:, PROMPT:])
        loss(logp, logp.detach(), advantages, mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def plain_logprobs(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[..., None])[..., 0]


def plain_loss(
    logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    ratio, a = torch.exp(logp - old), advantages[:, None]
    return (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum() / mask.sum()


def _trainer(tracked: bool) -> Step:
    """score, credit and update of our Trainer on given trajectories."""
    from react_fast.envs import Record, TextEnv
    from react_fast.trainer.config import TrainerConfig
    from react_fast.trainer.model import fresh_model
    from react_fast.trainer.rollout import Trajectory

    model = _model()
    _, tokenizer = fresh_model(["a b c"], vocab_size=300, hidden_size=16, layers=1, heads=2)
    env = TextEnv([Record(str(i)) for i in range(PROMPTS)], reward=lambda state, action, record: 0.0)
    config = TrainerConfig(
        steps=1000, prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=LENGTH - PROMPT,
        learning_rate=1e-6, micro_batch=ROWS,
    )  # fmt: skip
    tracker = rf.CausalityTracker(model, tokenizer) if tracked else None
    trainer = rf.Trainer(model, tokenizer, env, algorithm=rf.GRPO(), tracker=tracker, config=config)
    acts = torch.arange(LENGTH) >= PROMPT
    trajectories = [
        Trajectory(
            token_ids=row, action_mask=acts, turn_index=torch.zeros(LENGTH, dtype=torch.int64),
            sampler_logprobs=torch.where(acts, float("nan"), 0.0), rewards=[_reward(i)], state_ids=[i, i + 1],
            record=i // GROUP, group=i // GROUP,
        )
        for i, row in enumerate(_ids())
    ]  # fmt: skip
    return lambda: trainer.update(trainer.credit(trainer.score(trajectories)))


def _timed(step: Step) -> tuple[list[float], int | None]:
    """(seconds of every step but the first, bytes at the peak)"""
    step()
    wait()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(STEPS):
        start = now()
        step()
        wait()
        found.append(now() - start)
    return found, torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def _trl() -> tuple[list[float], int | None]:
    """GRPOTrainer with the same tokens from its `rollout_func`; generation is not counted."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from react_fast.trainer.model import fresh_model

    _, tokenizer = fresh_model(["a b c"], vocab_size=300, hidden_size=16, layers=1, heads=2)
    ids, found, began, rolled = _ids().tolist(), [], [0.0], [0.0]

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            wait()
            began[0], rolled[0] = now(), 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wait()
            found.append(now() - began[0] - rolled[0])
            if len(found) == 1 and DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()

    def rollout(prompts: Any, _: Any) -> dict[str, Any]:
        start = now()
        rows = [ids[i % ROWS] for i in range(len(prompts))]
        answers = [row[PROMPT:] for row in rows]
        rolled[0] += now() - start
        return {
            "prompt_ids": [row[:PROMPT] for row in rows],
            "completion_ids": answers,
            "logprobs": [[-1.0] * len(answer) for answer in answers],
        }

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=ROWS, num_generations=GROUP,
            max_completion_length=LENGTH - PROMPT, max_steps=STEPS + 1, learning_rate=1e-6, report_to="none",
            lr_scheduler_type="constant", use_cpu=DEVICE == "cpu", bf16=not TINY, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, log_level="error", beta=0.0,
        )  # fmt: skip
        GRPOTrainer(
            model=_model(),
            reward_funcs=lambda completions, **_: [_reward(i) for i in range(len(completions))],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(8)]),
            processing_class=tokenizer,
            callbacks=[Watch()],
            rollout_func=rollout,
        ).train()
    return found[1:], torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


# TRL first: where it is not installed its time is the others'.
CONTESTANTS: dict[str, Callable[[], tuple[list[float], int | None]]] = {
    "TRL GRPOTrainer": _trl,
    "react_fast ops": lambda: _timed(
        loop(rf.linear_token_logprobs, lambda *given: rf.policy_loss(*given).loss)[1]
    ),
    "torch": lambda: _timed(loop(plain_logprobs, plain_loss)[1]),
    "react_fast Trainer": lambda: _timed(_trainer(False)),
    "react_fast Trainer, tracker on": lambda: _timed(_trainer(True)),
}


def measure(name: str) -> None:
    """Tell one contestant's tokens a second and peak memory, or why it is absent."""
    facts: dict[str, Any] = {"name": name, "rows": ROWS, "length": LENGTH}
    try:
        taken, peak = CONTESTANTS[name]()
    except Exception as error:
        tell("training", kind="contestant", **facts, absent=brief(f"{type(error).__name__}: {error}"))
        print(name, error, flush=True)
        return
    middle = statistics.median(taken)
    facts |= {"seconds": middle, "samples": len(taken), "tokens_per_second": ROWS * LENGTH / middle}
    tell("training", kind="contestant", **facts, peak_bytes=peak)


def main() -> None:
    for number, name in enumerate(CONTESTANTS):
        seconds = (left() - 2) / (len(CONTESTANTS) - number)
        if seconds < 2:
            tell("training", kind="contestant", name=name, absent="no time left")
        elif TINY:
            measure(name)
        else:
            command = [sys.executable, "-m", "bench.gpu.training", name]
            state = process.run(command, seconds, cwd=Path.cwd(), environment={}, log=log())
            if state != "done":
                tell("training", kind="contestant", name=name, absent=f"{state}: {seconds:.0f} s were left")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1])
    else:
        main()
