"""Rollouts by a server that speaks the OpenAI completions API: vLLM, SGLang, llama.cpp, `transformers serve`."""

import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .completions import DIALECTS, Capabilities, choice_of, read_sample, token_ids, token_logprobs
from .http import HttpError, JsonClient
from .sampling import EngineError, Sample, SamplingParams, check_prompts, check_tokens
from .streams import key
from .trajectory import encode
from .weights import WeightFolder

_SERVER = 6  # stream of the seeds that requests are given
_SEEDS = 1 << 31  # what every server's seed field holds


class OpenAIEngine:
    """Rollouts over HTTP, one request a prompt, several at a time.

    A server that takes and returns token ids (vLLM) is used with them; else prompts are sent as text and answers
    tokenised again, their samples marked `exact_tokens=False` and counted as drifted where text and tokens do not
    agree. What the server can do is tried once, when the engine is made.

    Requests carry seeds keyed by (seed, step, turn, row), but a server batches as it likes and its arithmetic with
    it: runs with a server are not repeatable to the bit, resumed ones included.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: name under which the server knows the model; None: the only one it serves.
        tokenizer: of the policy.  eos_id: token that ends an action, or None.
        vocabulary: number of ids that the policy knows; others are refused; None: not known.
        timeout: seconds for one answer.  retries: of a request, with growing waits.
        concurrency: requests at once.
        server_logprobs: "raw": the server's log-probabilities are those at temperature 1 of all tokens (llama.cpp;
            vLLM as it starts); at another temperature they are not used. "processed": those it sampled from (vLLM
            with --logprobs-mode processed_logprobs, SGLang).
        api_key: bearer token, or None.
        sync_dir: folder for the weights; None: the server keeps those it has.
        reload: called with (folder, version) once new weights are there; a URL is posted SGLang's
            {"model_path": folder, "weight_version": version}.
        client: the HTTP client to use; None: one made from the above.
    Attributes:
        capabilities: what the server was seen to do.  version: number of the weights it samples with, 0 at first.
    Raises: EngineError in one line: server down, model unknown, refused or malformed answers.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: Any,
        eos_id: int | None,
        vocabulary: int | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        concurrency: int = 16,
        server_logprobs: str = "raw",
        api_key: str | None = None,
        sync_dir: str | Path | None = None,
        reload: str | Callable[[Path, int], None] | None = None,
        client: JsonClient | None = None,
    ) -> None:
        if server_logprobs not in ("raw", "processed"):
            raise ValueError(f"server_logprobs must be 'raw' or 'processed', got {server_logprobs!r}")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be an integer of at least 1, got {concurrency!r}")
        check_tokens(eos_id, 0)
        self.client = client or JsonClient(base_url, timeout=timeout, retries=retries, api_key=api_key)
        self.tokenizer, self.eos_id, self.concurrency = tokenizer, eos_id, concurrency
        self.server_logprobs, self.reload, self.vocabulary = server_logprobs, reload, vocabulary
        self.weights = WeightFolder(sync_dir, tokenizer) if sync_dir is not None else None
        self.version, self._given = 0, False
        self.model = self._served(model)
        self.capabilities = self._probe()
        if not self.capabilities.dialect:
            _warn("the server knows no option that switches off its own top-k, penalties and the like")

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Sample]:
        """Raises: ValueError for a truncated sampler: a server does not say which tokens it kept, so that its
        samples could not be scored; EngineError as above."""
        check_prompts(prompts, params)
        if params.truncated:
            raise ValueError(
                "top_k, top_p and min_p must keep all tokens for a server, which does not say what it kept"
            )
        if not self.capabilities.logprobs:
            _warn("the server returns no log-probabilities: its mismatch with the trainer is not measured")
        elif self._other_temperature(params) and not params.greedy:
            _warn(
                f"the server's log-probabilities are not those at temperature {params.temperature:g} and are not "
                "used; start vLLM with --logprobs-mode processed_logprobs and set server_logprobs to 'processed'"
            )
        rows = params.rows if params.rows is not None else range(len(prompts))
        with ThreadPoolExecutor(self.concurrency) as threads:
            tasks = [
                threads.submit(self._sample, list(prompt), row, params)
                for prompt, row in zip(prompts, rows, strict=True)
            ]
            wait(tasks, return_when=FIRST_EXCEPTION)
            threads.shutdown(wait=False, cancel_futures=True)
            failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception()]
            return [task.result() for task in failed or tasks]

    def sync_weights(
        self, model: Any, version: int, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Give the server the weights of a Hugging Face model, unless it has had this version from here.

        Args:
            weights: whole ones by name, where the model holds shards; None: the model's.
        Raises: EngineError if they cannot be written or the server does not take them.
        """
        if version == self.version and (self._given or self.weights is None):
            return
        if self.weights is None:
            _warn("the server keeps the weights it started with, since sync_dir is not set")
            return
        try:
            folder = self.weights.write(model, version, weights)
        except OSError as error:
            raise EngineError(f"sync_dir {self.weights.path} cannot be written: {error}") from None
        if callable(self.reload):
            self.reload(folder, version)
        elif self.reload is None:
            _warn("weights are written to sync_dir and nothing tells the server, since reload_url is not set")
        else:
            body = {"model_path": str(folder.resolve()), "weight_version": str(version)}
            answer = self.client.post(self.reload, body)
            if isinstance(answer, Mapping) and answer.get("success") is False:
                raise EngineError(f"{self.reload} did not load version {version}: {answer.get('message')}")
        self.version, self._given = version, True

    def _sample(self, prompt: list[int], row: int, params: SamplingParams) -> Sample:
        seed = key(params.seed, _SERVER, params.step, params.turn, row) % _SEEDS
        # A server puts what opens a sequence before a text; other special tokens, such as a chat template's, stay.
        before = encode(self.tokenizer, "")
        said = prompt[len(before) :] if prompt[: len(before)] == before else prompt
        text = self.tokenizer.decode(said, skip_special_tokens=False)
        body = self._body(prompt if self.capabilities.token_prompts else text, params.max_new_tokens)
        body |= {"temperature": 0.0 if params.greedy else params.temperature, "seed": seed}
        if self.capabilities.logprobs:
            body["logprobs"] = 1
        choice = choice_of(self.client.post("completions", body | dict(self.capabilities.dialect)))
        sample = read_sample(choice, self.tokenizer, self.eos_id, params.max_new_tokens, self.vocabulary)
        if not self.capabilities.token_prompts and encode(self.tokenizer, text) != prompt:
            sample.drifted = True
        if self._other_temperature(params):
            sample.logprobs = [math.nan] * len(sample.ids)
        sample.weights_version = self.version
        return sample

    def _body(self, prompt: Any, max_new_tokens: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "max_tokens": max_new_tokens, "n": 1, "top_p": 1.0}

    def _other_temperature(self, params: SamplingParams) -> bool:
        """Whether the server's log-probabilities are not the sampler's."""
        return self.server_logprobs == "raw" and params.temperature != 1

    def _served(self, model: str | None) -> str:
        """Name of the model. A server that cannot list its models is believed to have the one asked for."""
        listed: Any = {"data": []}
        with suppress(HttpError):
            listed = self.client.get("models")
        try:
            names = [str(entry["id"]) for entry in listed["data"]]
        except (TypeError, KeyError):
            raise EngineError(
                f"{self.client.base_url}/models: the answer must list models under 'data', got {str(listed)[:120]}"
            ) from None
        if model is None:
            if len(names) != 1:
                shown = ", ".join(names) or "a server that lists none"
                raise EngineError(f"served_model must name one of the server's models, got None for {shown}")
            return names[0]
        if names and model not in names:
            near = difflib.get_close_matches(model, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EngineError(f"{self.client.base_url} serves {', '.join(names)}, not {model!r}{hint}")
        return model

    def _probe(self) -> Capabilities:
        """Ask for one token in one form after the other until the server answers."""
        prompt = encode(self.tokenizer, "a") or [0]
        refusal: EngineError = EngineError("not asked")
        for given in (prompt, "a"):
            for dialect in DIALECTS:
                for logprobs in ({"logprobs": 1}, {}):
                    body = self._body(given, 1) | {"temperature": 1.0, "seed": 0} | logprobs | dict(dialect)
                    try:
                        choice = choice_of(self.client.post("completions", body, final=(500,)))
                    except HttpError as error:
                        refusal = error
                        continue
                    return Capabilities(
                        token_prompts=given is prompt,
                        token_ids=token_ids(choice) is not None,
                        logprobs=token_logprobs(choice) is not None,
                        dialect=dialect,
                    )
        raise EngineError(f"no form of completion was accepted: {refusal}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)  # shown once a place, as Python's filters have it
