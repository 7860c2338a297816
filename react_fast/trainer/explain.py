"""What a finished run can tell about its policy: the tracker's report, and one prompt explained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..envs import TextEnv
from ..tracker import CausalityTracker
from .checkpoint import load_checkpoint
from .config import RunConfig, TrackerConfig
from .folder import CONFIG, RunFolder, UserError
from .reporter import print_table
from .sources import load_policy, user_input
from .state import join


def quiet_libraries() -> None:
    """No progress bars and notices of transformers between the run's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path, Any, Any]:
    """(configuration, newest complete checkpoint, its model, its tokenizer) of a run.

    Raises: UserError if there is no run or no complete checkpoint.
    """
    quiet_libraries()
    folder = RunFolder(path)
    with user_input():
        folder.config()
        config = RunConfig.from_yaml(folder.path / CONFIG, overrides)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    checkpoint = folder.newest_checkpoint()
    return (
        config,
        checkpoint,
        *load_policy(config.model.replace(path=str(checkpoint)), [], config.trainer.seed),
    )


def make_tracker(config: TrackerConfig, model: Any, tokenizer: Any) -> CausalityTracker | None:
    if not config.enabled:
        return None
    return CausalityTracker(model, tokenizer, every=config.every, seed=config.seed)


def restore(tracker: CausalityTracker, checkpoint: Path) -> None:
    """What the tracker had seen when a checkpoint was written; nothing for a checkpoint of the warm start."""
    saved = load_checkpoint(checkpoint)
    state = join(saved.state["trainer"], saved.tensors)["tracker"]
    if state is not None:
        tracker.load_state_dict(state)


def write_report(tracker: CausalityTracker, env: TextEnv, config: RunConfig, path: Path) -> None:
    """The tracker's page, with some test prompts as examples: heat map and token deletions."""
    count = min(config.tracker.intervention_prompts, len(env.records))
    chosen = [env.records[i * len(env.records) // count] for i in range(count)]
    tracker.explain([record.prompt for record in chosen], max_new_tokens=config.trainer.max_new_tokens)
    tracker.report().to_html(path)


def explain(path: str | Path, text: str, *, html: str | Path | None = None) -> None:
    """Print what the answer of a run's policy to a prompt hangs on.

    Args:
        path: run folder. text: the prompt. html: also write the explanation as one page.
    Raises: UserError if there is no run or no complete checkpoint, for an empty prompt, or a page that cannot be
        written.
    """
    config, _, model, tokenizer = open_run(path)
    if not text:
        raise UserError("text must hold at least one token, got an empty text")
    tracker = CausalityTracker(model, tokenizer, seed=config.tracker.seed)
    tracker.explain([text], max_new_tokens=config.trainer.max_new_tokens)
    found, effects = tracker.heat_maps[0], tracker.effects
    tokens = found.prompt_tokens + found.response_tokens
    attribution = [sum(column) for column in zip(*found.scores, strict=True)]
    measured = {row.start: row for row in effects}
    rows = [
        [
            str(i),
            repr(token)[1:-1],
            f"{attribution[i]:+.3f}",
            f"{measured[i].mean:+.3f}" if i in measured else "",
        ]
        for i, token in enumerate(tokens)
    ]
    console = Console()
    console.print(f"answer: {''.join(found.response_tokens)}", markup=False, highlight=False)
    title = "log-probability of the answer, in nats"
    print_table(title, ["#", "token", "attribution", "effect of deleting it"], rows, console=console)
    if html is not None:
        try:
            tracker.report().to_html(html)
        except OSError as error:
            raise UserError(f"html {html} cannot be written: {error.strerror}") from error
        console.print(f"written: {html}", markup=False, highlight=False)
