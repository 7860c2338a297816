"""What a finished run can tell about its policy: the tracker's report, and one prompt explained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..envs import Record, TextEnv
from ..envs.record import rendered
from ..ops import _check
from ..tracker import CausalityTracker
from ..tracker.attribution import METHODS
from ..tracker.records import EffectRow
from ..tracker.report.terminal import heat_map_text
from ..tracker.report.text import printed, running
from ..tracker.text import check_count
from .checkpoint import load_checkpoint
from .config import RunConfig, TrackerConfig
from .folder import CONFIG, RunFolder, UserError
from .reporter import print_table
from .sources import load_policy, user_input
from .state import join

# The actions that a prompt and its answer can be cut into by name.
_ACTIONS = ("token", "word", "sentence", "line", "step")


def quiet_libraries() -> None:
    """No progress bars and notices of transformers between the run's own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_run(
    path: str | Path, overrides: Sequence[str] = (), *, best: bool = False
) -> tuple[RunConfig, Path, Any, Any]:
    """(configuration, newest complete or best checkpoint, its model, its tokenizer) of a run.

    Raises: UserError if there is no run or no such checkpoint.
    """
    quiet_libraries()
    folder = RunFolder(path)
    with user_input():
        folder.config()
        config = RunConfig.from_yaml(folder.path / CONFIG, overrides)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    checkpoint = folder.best_checkpoint() if best else folder.newest_checkpoint()
    return (
        config,
        checkpoint,
        *load_policy(config.model.replace(path=str(checkpoint), chat_template=None), [], config.trainer.seed),
    )


def make_tracker(config: TrackerConfig, model: Any, tokenizer: Any) -> CausalityTracker | None:
    if not config.enabled:
        return None
    return CausalityTracker(
        model, tokenizer, every=config.every, seed=config.seed, groups=config.groups, decay=config.decay
    )


def restore(tracker: CausalityTracker, checkpoint: Path) -> None:
    """What the tracker had seen when a checkpoint was written; nothing for a checkpoint of the warm start.

    Raises: UserError for a checkpoint of another version.
    """
    saved = load_checkpoint(checkpoint)
    state = join(saved.state["trainer"], saved.tensors)["tracker"]
    if state is None:
        return
    try:
        tracker.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint} is of another version: its tracker's {error}") from error


def write_report(tracker: CausalityTracker, env: TextEnv, config: RunConfig, path: Path) -> None:
    """The tracker's page, with some test prompts as examples: heat map and token deletions."""
    count = min(config.tracker.intervention_prompts, len(env.records))
    chosen = [env.records[i * len(env.records) // count] for i in range(count)]
    for record in (rendered(one, tracker.tokenizer) for one in chosen):
        limit, special = config.trainer.max_new_tokens, record.conversation is None
        tracker.explain([record.prompt], max_new_tokens=limit, special_tokens=special)
    tracker.report().to_html(path)


def explain(
    path: str | Path,
    text: str,
    *,
    html: str | Path | None = None,
    actions: str = "token",
    method: str | None = None,
    samples: int | None = None,
    chat: bool = False,
) -> None:
    """Print what the answer of a run's policy to a prompt hangs on: a coloured heat map and a table.

    Args:
        path: run folder. text: the prompt. html: also write the explanation as one page.
        actions: what is taken away: "token", "word", "sentence", "line" or "step".
        method: of the attribution; None: gradient x input.
        samples: continuations of each action; None: the answer as it is.
        chat: the text is what a user says; the tokenizer's chat template makes the prompt.
    Raises: UserError if there is no run or no complete checkpoint, for an empty prompt, another name or number
        than these, or a page that cannot be written.
    """
    if not text:
        raise UserError("text must hold at least one token, got an empty text")
    with user_input():
        _check.choice("actions", actions, _ACTIONS)
        _check.choice("method", METHODS[0] if method is None else method, METHODS)
        if samples is not None:
            check_count("samples", samples, 2)
    config, _, model, tokenizer = open_run(path)
    tracker = CausalityTracker(model, tokenizer, seed=config.tracker.seed)
    with user_input():
        said = rendered(Record([{"role": "user", "content": text}] if chat else text), tokenizer)
        options: dict[str, Any] = {"actions": actions, "method": method, "samples": samples}
        options["special_tokens"] = not chat
        tracker.explain([said.prompt], max_new_tokens=config.trainer.max_new_tokens, **options)
    report = tracker.report()
    found, effects = tracker.heat_maps[0], tracker.effects
    console = Console()
    console.print(f"answer: {printed(''.join(found.response_tokens))}", markup=False, highlight=False)
    console.print(heat_map_text(found))
    title = "log-probability of the answer, in nats"
    rows = _rows(found.sums(), found.prompt_tokens + found.response_tokens, effects)
    print_table(title, ["place", actions, "attribution", "effect of deleting it"], rows, console=console)
    if html is not None:
        try:
            report.to_html(html)
        except OSError as error:
            raise UserError(f"html {html} cannot be written: {error.strerror}") from error
        console.print(f"written: {html}", markup=False, highlight=False)


def _rows(
    attribution: Sequence[float], tokens: Sequence[str], effects: Sequence[EffectRow]
) -> list[list[str]]:
    """A row for every action with an effect, and for every token outside of them."""
    inside = {place for row in effects for place in range(row.start, row.end)}
    spans = {(row.start, row.end): row for row in effects}
    places = sorted([*spans, *((i, i + 1) for i in range(len(tokens)) if i not in inside)])
    return [
        [
            str(start) if end == start + 1 else f"{start}-{end - 1}",
            repr("".join(tokens[start:end]))[1:-1] or running(""),
            f"{sum(attribution[start:end]):+.3f}",
            _effect(spans.get((start, end))),
        ]
        for start, end in places
    ]


def _effect(row: EffectRow | None) -> str:
    if row is None:
        return ""
    bounds = f" [{row.low:+.3f}, {row.high:+.3f}]" if row.samples > 1 else ""
    return f"{row.mean:+.3f}{bounds}{' *' if row.significant else ''}"
