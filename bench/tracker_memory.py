"""Peak memory of the tracker on one long text: `python -m bench.tracker_memory [--tokens 8192]`.

The model of bench_tracker with 32 response tokens, float32. Every measure runs in a process of its own; its peak
is the largest resident set during the call, less that before it. Writes bench/results/tracker_memory.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from react_fast.tracker import CausalityTracker, Replacement, faithfulness

from .memory import _peak, _resident, _start_over
from .report import RESULTS

TOKENS, RESPONSE, VOCAB = 8192, 32, 8192


def _cases(tracker: CausalityTracker, ids: list[int], response: list[int]) -> dict[str, Callable[[], Any]]:
    """The spans lie at the end, in the middle and at the beginning."""
    size = len(ids)
    spans = [(place + i, place + i + 1) for place in (size // 8, size // 2, size - 8) for i in range(8)]
    integrated: dict[str, Any] = {"method": "integrated_gradients", "baseline": 0, "steps": 3}
    scores = {"noise": torch.randn(size + len(response))}
    measures: dict[str, Any] = {"points": 2, "subsets": 4, "counterfactual": Replacement(0)}
    return {
        "gradient x input, sequence form": lambda: tracker.attribute(ids, response),
        "gradient x input, matrix form, 4 rows": lambda: tracker.attribute(ids, response[:4], "token"),
        "integrated gradients, sequence form": lambda: tracker.attribute(ids, response, **integrated),
        "24 interventions, fixed response": lambda: tracker.intervene(ids, response, spans),
        "24 interventions, 2 samples": lambda: tracker.intervene(
            ids, response, spans, len, 2, max_new_tokens=4
        ),
        "faithfulness, 4 subsets": lambda: faithfulness(tracker, ids, response, scores, **measures),
    }


def _measured(name: str, tokens: int) -> int:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    tracker = CausalityTracker(AutoModelForCausalLM.from_config(config))
    ids = torch.randint(3, VOCAB, (tokens,)).tolist()
    _cases(tracker, ids[:64], ids[64:72])[name]()
    call = _cases(tracker, ids[:-RESPONSE], ids[-RESPONSE:])[name]
    _start_over()
    before = _resident()
    call()
    return max(0, _peak() - before)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tracker_memory")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--case")
    given: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.case:
        print(json.dumps(_measured(given.case, given.tokens)))
        return
    whole = given.tokens * VOCAB * 4 / 2**20
    lines = [
        f"One text of {given.tokens} tokens, {RESPONSE} of them the response; Llama of 4 layers, width 256, "
        f"{VOCAB} tokens, float32, torch {torch.__version__}. Its logits as a whole would take {whole:,.0f} MiB, "
        f"one head's attention weights {given.tokens**2 * 4 / 2**20:,.0f} MiB.",
        "",
        "| what | peak MiB beyond the model |",
        "| --- | --- |",
    ]
    for name in _cases(None, [0] * 64, [0]):  # type: ignore[arg-type]
        command = [
            sys.executable,
            "-m",
            "bench.tracker_memory",
            "--case",
            name,
            "--tokens",
            str(given.tokens),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        lines.append(f"| {name} | {json.loads(found.stdout.splitlines()[-1]) / 2**20:,.0f} |")
        print(lines[-1], flush=True)
    (RESULTS / "tracker_memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
