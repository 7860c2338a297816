"""Random numbers keyed by what they are for, so that no order of calls and no batch split changes them."""

import numpy as np
import torch

from .sampling import SamplingParams


def key(*numbers: int) -> int:
    """A 63-bit key for every tuple of numbers, which count modulo 2^32; what random streams are named by."""
    words = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)
    return int(words[0] >> 1)


def permutation(count: int, *keys: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key(*keys))).permutation(count)


def uniforms(params: SamplingParams, count: int) -> torch.Tensor:
    """[rows, max_new_tokens] float64 in [0, 1) from Philox streams keyed by (seed, step) and (turn, row), each
    from its place `skip` on."""
    rows = params.rows if params.rows is not None else range(count)
    key = np.array([params.seed, params.step], dtype=np.uint64)
    skip = params.skip if params.skip is not None else [0] * count
    draws = np.empty((count, params.max_new_tokens))
    for i, (row, start) in enumerate(zip(rows, skip, strict=True)):
        counter = np.array([0, 0, params.turn, row], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        draws[i] = stream.random(start + params.max_new_tokens)[start:]
    return torch.from_numpy(draws)
