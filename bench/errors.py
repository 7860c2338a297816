"""Errors against float64 in ulps of float32: `python -m bench.errors` writes bench/results/errors.md.

The input is rounded to its dtype first, and the float64 result of the rounded input is the truth. An error is
divided by the distance between neighbouring float32 numbers at the truth. For bfloat16 hidden states the logits
themselves are rounded to bfloat16 by the GEMM, in every contestant, and that is what the numbers show.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from .common import built, name_of
from .heads import Head
from .peers import contestants

ROWS, VOCAB, DIM = 64, 32000, 256
DTYPES = (torch.float32, torch.bfloat16)
Make = Callable[[tuple[int, int]], torch.Tensor]


def _one_hot(shape: tuple[int, int]) -> torch.Tensor:
    x = torch.zeros(shape)
    x[torch.arange(shape[0]), torch.randint(shape[1], shape[:1])] = 30.0
    return x


def _masked(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape).masked_fill_(torch.rand(shape) < 0.9, -torch.inf)


LOGITS: dict[str, Make] = {
    "random, scale 1": torch.randn,
    "random, scale 3": lambda shape: 3 * torch.randn(shape),
    "random, scale 20": lambda shape: 20 * torch.randn(shape),
    "huge, 1e4": lambda shape: 1e4 * torch.randn(shape),
    "tiny, 1e-6": lambda shape: 1e-6 * torch.randn(shape),
    "all equal": lambda shape: torch.full(shape, 0.7),
    "one-hot, 30": _one_hot,
    "-inf masked, 90%": _masked,
}
# Scale of the logits that hidden states make.
HIDDEN = {
    "random, scale 1": 1.0,
    "random, scale 3": 3.0,
    "random, scale 20": 20.0,
    "huge, 1e4": 1e4,
    "tiny, 1e-6": 1e-6,
    "all equal (zeros)": 0.0,
}


def ulps(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(largest, mean) error in float32 ulps of the truth; equal infinities are no error, a NaN is infinite."""
    near = want.float().abs()
    step = torch.nextafter(near, near.new_tensor(torch.inf)).double() - near.double()
    off = (got.detach().double() - want).abs() / step
    off = torch.where(got.detach().double() == want, 0.0, off).nan_to_num(torch.inf, posinf=torch.inf)
    return float(off.max()), float(off.mean())


def truth(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logp and H of float64 logits. log p of the largest logit by log1p, so that it does not cancel."""
    top, place = logits.max(-1)
    rest = (logits - top[:, None]).exp().scatter(-1, place[:, None], 0.0)
    log_sum = torch.log1p(rest.sum(-1))
    log_p = logits - top[:, None] - log_sum[:, None]
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
    return log_p.gather(-1, ids[:, None])[:, 0], -terms.sum(-1)


def _number(x: float) -> str:
    return f"{x:.2g}" if x < 100 else f"{x:.1e}".replace("e+0", "e").replace("e+", "e")


def _cells(found: dict[str, torch.Tensor], want: torch.Tensor) -> str:
    return " | ".join(" / ".join(map(_number, ulps(x, want))) for x in found.values())


def _ids(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit in every other row, where log p is near 0, and a random allowed one elsewhere."""
    ids = torch.multinomial(torch.isfinite(logits).double(), 1)[:, 0]
    return torch.where(torch.arange(len(ids)) % 2 == 0, logits.argmax(-1), ids)


def from_logits() -> tuple[list[str], list[str]]:
    """(contestants, rows of the table)."""
    table = {name: contestants.LOGITS[name] for name in ("react_fast", "torch", "TRL selective")}
    ops, absent = built(table)
    lines = []
    for dtype in DTYPES:
        for case, make in LOGITS.items():
            logits = make((ROWS, VOCAB)).to(dtype)
            ids = _ids(logits)
            wants = truth(logits.double(), ids)
            found = [op(logits, ids, True) for op in ops.values()]
            for i, what in enumerate(("logp", "H")):
                cells = _cells({name: x[i] for name, x in zip(ops, found, strict=True)}, wants[i])
                lines.append(f"| {name_of(dtype)} | {case} | {what} | {cells} |")
    return [*ops, *(f"({name}: {why})" for name, why in absent.items())], lines


def from_hidden() -> tuple[list[str], list[str]]:
    head = Head("errors", DIM, VOCAB)
    table = {name: contestants.LINEAR[name] for name in ("react_fast", "torch", "TRL chunked")}
    ops, absent = built(table, head)
    lines = []
    for dtype in DTYPES:
        for case, scale in HIDDEN.items():
            hidden = torch.randn(ROWS, DIM).to(dtype)
            weight = (scale / DIM**0.5 * torch.randn(VOCAB, DIM)).to(dtype)
            logits = hidden.double() @ weight.double().T
            ids = _ids(logits)
            want, _ = truth(logits, ids)
            found = {name: op(hidden, weight, ids) for name, op in ops.items()}
            lines.append(f"| {name_of(dtype)} | {case} | logp | {_cells(found, want)} |")
    return [*ops, *(f"({name}: {why})" for name, why in absent.items())], lines


def _table(names: list[str], lines: list[str]) -> str:
    columns = [name for name in names if not name.startswith("(")]
    absent = "".join(f"\n\nAbsent: {name[1:-1]}." for name in names if name.startswith("("))
    head = ["dtype", "input", "of", *columns]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) + absent


def document() -> str:
    torch.manual_seed(0)
    with torch.no_grad():
        logits, hidden = _table(*from_logits()), _table(*from_hidden())
    return (
        "# Errors against float64\n\n"
        f"Command: `python -m bench.errors`; torch {torch.__version__}, python {platform.python_version()}. "
        "Largest / mean error of a log-prob and of an entropy, in ulps of the float32 nearest to the truth, which "
        "is the float64 result of the same rounded input. `inf`: NaN, or infinite where the truth is not. TRL and "
        "torch return the dtype they get, so that a bfloat16 result alone is good to 32768 ulps at best; "
        "react_fast returns float32.\n\n"
        f"## From logits [{ROWS}, {VOCAB}]\n\n"
        "Every other row asks for its largest logit, where log p is near 0.\n\n"
        f"{logits}\n\n"
        f"## From hidden states [{ROWS}, {DIM}] and a head [{VOCAB}, {DIM}]\n\n"
        "The GEMM is part of the error: in float32 its sums of products, in bfloat16 the rounding of the logits "
        f"to bfloat16, the same for all.\n\n{hidden}\n"
    )


def main() -> None:
    default = Path(__file__).parent / "results" / "errors.md"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=default, help="file of the tables")
    target = parser.parse_args().out
    target.parent.mkdir(parents=True, exist_ok=True)
    text = document()
    target.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
