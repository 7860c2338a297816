"""The engines by the names that a configuration gives them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .sampling import EngineError, RolloutEngine
from .trajectory import pad_token


def _policy(config: Any, model: Any, tokenizer: Any, folder: Path | None) -> None:
    return None


def _generate(config: Any, model: Any, tokenizer: Any, folder: Path | None) -> RolloutEngine:
    from .generate_engine import GenerateEngine

    eos_id, pad_id = tokenizer.eos_token_id, pad_token(tokenizer)
    return GenerateEngine(model, eos_id=eos_id, pad_id=pad_id, options=config.generation_options)


def _continuous(config: Any, model: Any, tokenizer: Any, folder: Path | None) -> RolloutEngine:
    from .generate_engine import ContinuousBatchingEngine

    eos_id, pad_id = tokenizer.eos_token_id, pad_token(tokenizer)
    return ContinuousBatchingEngine(model, eos_id=eos_id, pad_id=pad_id, options=config.generation_options)


def _openai(config: Any, model: Any, tokenizer: Any, folder: Path | None) -> RolloutEngine:
    from .openai_engine import OpenAIEngine

    key = None
    if config.api_key_variable is not None:
        key = os.environ.get(config.api_key_variable)
        if key is None:
            raise EngineError(f"rollout.api_key_variable names {config.api_key_variable}, which is not set")
    sync_dir = config.sync_dir or (folder if config.reload_url is not None else None)
    return OpenAIEngine(
        config.base_url,
        config.served_model,
        tokenizer=tokenizer,
        eos_id=tokenizer.eos_token_id,
        vocabulary=model.get_input_embeddings().num_embeddings,
        timeout=config.timeout,
        retries=config.retries,
        concurrency=config.concurrency,
        server_logprobs=config.server_logprobs,
        api_key=key,
        sync_dir=sync_dir,
        reload=config.reload_url,
    )


Make = Callable[[Any, Any, Any, Path | None], RolloutEngine | None]
ENGINES: dict[str, Make] = {
    "policy": _policy,
    "generate": _generate,
    "continuous": _continuous,
    "openai": _openai,
}


def make_engine(config: Any, model: Any, tokenizer: Any, folder: Path | None = None) -> RolloutEngine | None:
    """The engine of a `RolloutConfig`; None for "policy", which the trainer makes itself.

    Args:
        folder: for weights that a server is to load, if `config.sync_dir` names none.
    Raises: EngineError in one line for a server that cannot be used.
    """
    return ENGINES[config.engine](config, model, tokenizer, folder)
