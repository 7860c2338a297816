"""One answer of an OpenAI-compatible /v1/completions, as a sample."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .sampling import EngineError, Sample
from .trajectory import encode

_WHOLE = {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# Names of vLLM and SGLang, of llama.cpp, of `transformers serve`, and only those that every server knows. Each but
# the last switches off what a server would do by itself, such as llama.cpp's top-k of 40 or transformers' greedy
# search.
DIALECTS: tuple[Mapping[str, Any], ...] = (
    {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    },
    {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    {"generation_config": json.dumps(_WHOLE)},
    {},
)
_TOKEN_ID = "token_id:"  # vLLM's spelling of tokens under return_tokens_as_token_ids
_UNDECODABLE = "\ufffd"  # part of a character


@dataclass(frozen=True)
class Capabilities:
    """What a server was seen to do.

    Attributes:
        token_prompts: takes token ids as prompt.  token_ids: returns those it generated.
        logprobs: returns log-probabilities.  dialect: its names of the sampling options.
    """

    token_prompts: bool
    token_ids: bool
    logprobs: bool
    dialect: Mapping[str, Any]

    def line(self) -> str:
        prompts = "token ids" if self.token_prompts else "text"
        answers = "token ids" if self.token_ids else "text that is tokenised again"
        logprobs = f"{'with' if self.logprobs else 'without'} log-probabilities"
        return f"prompts as {prompts}, answers as {answers}, {logprobs}"


def choice_of(answer: Any) -> Mapping[str, Any]:
    """The one choice of an answer.

    Raises: EngineError in one line for an answer that is none.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, Sequence) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise _malformed("one choice", answer)
    if not isinstance(choices[0].get("text"), str) and token_ids(choices[0]) is None:
        raise _malformed("text or token ids in its choice", choices[0])
    return choices[0]


def token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The generated ids, if the server says them."""
    ids = choice.get("token_ids", _logprobs(choice).get("ids"))
    if ids is None:
        tokens = _logprobs(choice).get("tokens")
        if not tokens or not all(isinstance(t, str) and t.startswith(_TOKEN_ID) for t in tokens):
            return None
        digits = [t.removeprefix(_TOKEN_ID) for t in tokens]
        ids = [int(d) if d.isdecimal() else d for d in digits]
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise _malformed("whole numbers as token_ids, none of them negative", ids)
    return ids


def token_logprobs(choice: Mapping[str, Any]) -> list[float] | None:
    """Log-probabilities of the server's own tokens, NaN for null and for what is not finite; None if it returns
    none."""
    values = _logprobs(choice).get("token_logprobs")
    if values is None:
        return None
    if not isinstance(values, list) or not all(v is None or type(v) in (int, float) for v in values):
        raise _malformed("numbers as token_logprobs", values)
    return [math.nan if v is None or not math.isfinite(v) else min(float(v), 0.0) for v in values]


def read_sample(
    choice: Mapping[str, Any],
    tokenizer: Any,
    eos_id: int | None,
    max_new_tokens: int,
    vocabulary: int | None = None,
) -> Sample:
    """The action of a choice, up to its first end token; text is tokenised again, and has log-probabilities only
    where its tokens turn out to be those of the server.

    Args:
        eos_id: appended to an action that ended without one, unless the server says that another token ended it
            or there is no room.
        vocabulary: number of ids that the policy knows; None: not known.
    Raises: EngineError in one line for a malformed answer.
    """
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise _malformed("a finish_reason of 'stop' or 'length'", reason)
    ids, logprobs = token_ids(choice), token_logprobs(choice)
    exact, drifted = ids is not None, False
    if ids is None:
        ids = encode(tokenizer, choice["text"], special=False)
        drifted = tokenizer.decode(ids, skip_special_tokens=False) != choice["text"]
        pieces = _logprobs(choice).get("tokens")
        if pieces is None or not _same_tokens(pieces, ids, tokenizer):
            drifted, logprobs = drifted or pieces is not None, None
    if logprobs is not None and len(logprobs) != len(ids):
        raise _malformed(f"a log-probability for each of its {len(ids)} tokens", logprobs)
    if exact and len(ids) > max_new_tokens:
        raise _malformed(f"at most {max_new_tokens} tokens", ids)
    if vocabulary is not None and max(ids, default=0) >= vocabulary:
        raise _malformed(f"token_ids below {vocabulary}, the size of the policy's vocabulary", ids)
    logprobs = [math.nan] * len(ids) if logprobs is None else logprobs
    if eos_id in ids:
        length = ids.index(eos_id) + 1
        ids, logprobs, reason = ids[:length], logprobs[:length], "stop"
    elif reason == "stop" and eos_id is not None:
        ended = ids and choice.get("stop_reason") == ids[-1]  # vLLM names another end token
        if not ended and not (exact and len(ids) == max_new_tokens):
            ids, logprobs = [*ids, eos_id], [*logprobs, math.nan]
    if len(ids) > max_new_tokens:
        ids, logprobs, reason, drifted = ids[:max_new_tokens], logprobs[:max_new_tokens], "length", True
    return Sample(ids, logprobs, reason, exact_tokens=exact, drifted=drifted)


def _logprobs(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The choice's log-probabilities as lists: tokens, token_logprobs, and ids if there are any. The server of
    llama.cpp itself (not of its Python bindings) has one list of tokens instead."""
    found = choice.get("logprobs")
    if not isinstance(found, Mapping):
        return {}
    content = found.get("content")
    if not isinstance(content, Sequence) or not all(isinstance(token, Mapping) for token in content):
        return found
    names = {"tokens": "token", "token_logprobs": "logprob", "ids": "id"}
    return {
        name: [token[key] for token in content]
        for name, key in names.items()
        if all(key in token for token in content)
    }


def _same_tokens(pieces: Sequence[Any], ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the server's tokens, as text, are these. A piece of a character has no text of its own."""
    if len(pieces) != len(ids):
        return False
    texts = (tokenizer.decode([i], skip_special_tokens=False) for i in ids)
    return all(
        piece == text or _UNDECODABLE in text or _UNDECODABLE in str(piece) or not piece
        for piece, text in zip(pieces, texts, strict=True)
    )


def _malformed(wanted: str, got: Any) -> EngineError:
    return EngineError(f"the server's answer must have {wanted}, got {' '.join(repr(got).split())[:160]}")
