"""How much of a trained policy's softmax mass lies in few tiles of the vocabulary.

    react-fast train --config examples/translation.yaml --run_dir runs/m --warm_start.steps 400 --trainer.steps 40
    python -m bench.tile_mass NAME=runs/m/checkpoints/rl/step-00000040 ...

Decides whether a block-sparse backward pays: it may leave out a tile of logits where every row of the tile can
spare it, a row at most `eps` of its mass in all. The policies are those of the translation demo, read at the
tokens of the test split's references. Writes bench/results/tile_mass.md and .png.

Source: the filter without a bound per row is Wijmans et al. 2024 (arXiv:2411.09009).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from react_fast.envs.tasks import translation
from react_fast.trainer.model import load_model

from .report import RESULTS

TILES = 64  # a 150k vocabulary has 600 of 256 columns; these vocabularies do not
BLOCK = 128  # rows of a GEMM's tile, which share what is left out
EPS = (2.0**-8, 2.0**-12, 2.0**-20)
# Below this share of the tiles a dropped tile's saving of three GEMMs exceeds the cost of sparse ones.
WORTH = 0.4


@torch.no_grad()
def softmax_rows(checkpoint: str, pairs: Sequence[str]) -> torch.Tensor:
    """[N, V] float64, the policy's distribution at every token of the references."""
    model, tokenizer = load_model(checkpoint, torch.float32)
    rows = []
    for record in translation.load(pairs, "test"):
        prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(record.reference, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
        rows.append(logits.double().softmax(-1))
    return torch.cat(rows)


def tile_masses(p: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N, TILES], tokens in the order of their mean mass, which is kinder than the tokenizer's."""
    p = p[:, p.mean(0).argsort(descending=True)]
    return torch.stack([tile.sum(1) for tile in p.tensor_split(TILES, dim=1)], 1)


def tiles_needed(mass: torch.Tensor, eps: float) -> torch.Tensor:
    """[N] fewest tiles that hold all but eps of a row's mass."""
    rest = mass.sort(1).values.cumsum(1)
    return mass.shape[1] - (rest <= eps).sum(1)


def active(mass: torch.Tensor, eps: float, block: int) -> float:
    """Share of the (block of rows, tile) pairs that stay: rows in the order of their largest tile, tiles dropped
    from the least upwards until a row of the block would lose more than eps."""
    mass = mass[mass.argmax(1).argsort(stable=True)]
    kept = 0
    blocks = mass.split(block)
    for rows in blocks:
        rising = rows[:, rows.amax(0).argsort()]
        kept += rows.shape[1] - int((rising.cumsum(1).amax(0) <= eps).sum())
    return kept / (len(blocks) * mass.shape[1])


def table(found: dict[str, torch.Tensor]) -> str:
    """Markdown: one row a policy and eps."""
    lines = [
        f"| policy | rows | V | entropy, nats | eps | tiles of {TILES} a row needs, median (90%) | "
        f"active, rows alone | active, blocks of {BLOCK} rows | GEMMs of 4 |",
        "| --- " * 9 + "|",
    ]
    for name, p in found.items():
        mass = tile_masses(p)
        entropy = float(torch.special.entr(p).sum(1).mean())
        for eps in EPS:
            needed = tiles_needed(mass, eps).double()
            alone, together = active(mass, eps, 1), active(mass, eps, BLOCK)
            lines.append(
                f"| {name} | {len(p)} | {p.shape[1]} | {entropy:.2f} | 2^{torch.tensor(eps).log2():.0f} | "
                f"{needed.median():.0f} ({needed.quantile(0.9):.0f}) | {alone:.2f} | {together:.2f} | "
                f"{1 + 3 * together:.2f} |"
            )
    return "\n".join(lines)


def picture(found: dict[str, torch.Tensor], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, p in found.items():
        mass = tile_masses(p)
        exponents = mass.clamp_min(2.0**-30).log2().flatten()
        left.hist(exponents.tolist(), bins=60, range=(-30, 0), histtype="step", density=True, label=name)
        needed = tiles_needed(mass, EPS[-1])
        right.hist(needed.tolist(), bins=TILES, range=(0.5, TILES + 0.5), histtype="step", density=True)
    left.set_xlabel("log2 of a row's mass in a tile")
    left.set_ylabel("share of (row, tile) pairs")
    left.axvline(torch.tensor(EPS[-1]).log2().item(), color="grey", linewidth=0.8)
    right.set_xlabel(f"tiles of {TILES} that hold all but 2^-20 of a row")
    right.set_ylabel("share of rows")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tile_mass")
    parser.add_argument("policies", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--pairs", nargs="+", default=["es-pt", "es-it"])
    given: Any = parser.parse_args(arguments)
    named = [policy.partition("=")[::2] for policy in given.policies]
    found = {name: softmax_rows(checkpoint, given.pairs) for name, checkpoint in named}
    text = table(found)
    worst = {name: active(tile_masses(p), EPS[-1], BLOCK) for name, p in found.items()}
    pays = [name for name, a in worst.items() if a <= WORTH]
    verdict = f"At eps 2^-20 and an active share of at most {WORTH} it pays for: {', '.join(pays) or 'none'}."
    (RESULTS / "tile_mass.md").write_text(f"{text}\n\n{verdict}\n")
    picture(found, RESULTS / "tile_mass.png")
    print(text, verdict, sep="\n\n")


if __name__ == "__main__":
    main()
