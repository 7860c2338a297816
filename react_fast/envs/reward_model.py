"""Reward models: modules that give a text one number, as reward functions."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from .record import chat_text, check_template


class RewardModel:
    """A sequence classifier with one label as a reward function of TRL's form: its logit for prompt + response.

    Plain texts are joined; conversations are rendered, the answer included, by the tokenizer's own chat template.
    In both cases the tokenizer adds no special tokens, as in TRL. Texts are cut on the left: what is over
    `max_length` goes from the prompt's beginning, and `rewards/<name>/truncated` counts such texts. Rows are
    padded on the right whatever the tokenizer does, so that positions count from the text's beginning.

    Args:
        model: torch.nn.Module, called as model(input_ids [B, T], attention_mask [B, T]); it returns [B, 1], or an
            object with such `logits`. It is put in evaluation mode and asked without gradient.
        tokenizer: its tokenizer.
        batch_size: texts of a forward.
        max_length: tokens of a text; None: the most that model and tokenizer say they take.
        name: in logs; None: the module's class.
    Raises: TypeError or ValueError, naming the argument; also where batches need a pad token that the tokenizer
        lacks, or that a Hugging Face model, which finds a text's end by it, does not know.
    Source: TRL 1.16, GRPOTrainer._calculate_rewards.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(getattr(model, "eval", None)) or not hasattr(model, "parameters"):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be callable, got {type(tokenizer).__name__}")
        for key, value in (("batch_size", batch_size), ("max_length", max_length)):
            given = value is not None
            if given and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{key} must be an integer of at least 1, got {value!r}")
        self.pad_id = getattr(tokenizer, "pad_token_id", None)
        if batch_size > 1:
            self._check_pad_token(model, batch_size)
        limit = _longest(model, tokenizer)
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length must be at most {limit}, which the model takes, got {max_length}")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.max_length = limit if max_length is None else max_length
        self.__name__ = name or type(model).__name__

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_count: Callable[..., None] | None = None
    ) -> list[float]:
        """The reward of every row.

        Raises: ValueError for a text without tokens, a conversation without chat template, or a model that gives
            something else than one number a text.
        """
        rows = [self._ids(*row) for row in zip(prompts, completions, strict=True)]
        limit = self.max_length
        if log_count is not None:
            log_count("truncated", [float(limit is not None and len(row) > limit) for row in rows])
        rows = [row if limit is None else row[-limit:] for row in rows]
        rewards = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for i, value in zip(chosen, self._logits([rows[i] for i in chosen]), strict=True):
                rewards[i] = value
        return rewards

    def check_template(self) -> None:
        """Raises: ValueError in one line if it cannot read conversations."""
        check_template(self.tokenizer, f"the tokenizer of reward model {self.__name__}")

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        plain = isinstance(prompt, str)
        text = prompt + completion if plain else chat_text(self.tokenizer, [*prompt, *completion])
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError(f"the text must hold at least one token, got {text!r}")
        return ids

    def _logits(self, rows: Sequence[list[int]]) -> list[float]:
        import torch

        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        width, pad = max(map(len, rows)), 0 if self.pad_id is None else self.pad_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            found = self.model(input_ids=ids, attention_mask=mask)
        logits = getattr(found, "logits", found)
        if tuple(getattr(logits, "shape", ())) != (len(rows), 1):
            shape = list(getattr(logits, "shape", [])) or type(logits).__name__
            raise ValueError(
                f"the reward model must give [{len(rows)}, 1] for {len(rows)} texts, got {shape}"
            )
        return logits[:, 0].double().tolist()

    def _check_pad_token(self, model: Any, batch_size: int) -> None:
        if self.pad_id is None:
            raise ValueError(
                f"tokenizer must have a pad token for batch_size {batch_size}; give one, or batch_size 1"
            )
        config = _config(model)
        if config is not None and config.pad_token_id != self.pad_id:
            wanted = f"must be {self.pad_id} like the tokenizer's for batch_size {batch_size}"
            raise ValueError(f"model.config.pad_token_id {wanted}, got {config.pad_token_id}")


def _config(model: Any) -> Any:
    """A Hugging Face model's configuration of its text part; None for another module."""
    config = getattr(model, "config", None)
    with contextlib.suppress(AttributeError):
        config = config.get_text_config()  # type: ignore[union-attr]
    return config if hasattr(config, "pad_token_id") else None


def _longest(model: Any, tokenizer: Any) -> int | None:
    """Tokens that model and tokenizer say they take; None if neither does."""
    told = (
        getattr(_config(model), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    # transformers says 1e30 where a tokenizer has no limit.
    return min((int(n) for n in told if n is not None and 0 < n < 1 << 40), default=None)
