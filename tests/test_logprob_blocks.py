"""token_logprobs on the CPU where a row is cut: blocks, their largest logits, and the units of their sums."""

import pytest
import torch

import react_fast as rf

from . import contract
from .logprob_cases import DTYPES, INF, assert_gradient, assert_within_bound, both, case

HALVES = (torch.bfloat16, torch.float16)
# A block is 2 to 8 KiB of logits by instruction set, and rows above 16384 go another way: sizes beside these.
VOCABS = (511, 512, 513, 2047, 2049, 4095, 4096, 4097, 8193, 16384, 16385, 24577)


@pytest.mark.parametrize("vocab", VOCABS)
def test_largest_logit_anywhere(isa, vocab):
    """In the first, a middle and the last place, alone, twice, and below zero like every other."""
    for dtype in DTYPES[:3]:
        logits, ids = case((5, vocab), dtype)
        top = logits.max() + 1
        for row, places in enumerate(((0,), (vocab // 2,), (-1,), (0, -1))):
            logits[row, list(places)] = top
        logits[4] -= 100
        ids[::2] = logits.argmax(-1)[::2]
        assert_within_bound(both(logits, ids), logits, ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.05}, {"softcap": 5.0}], ids=str)
def test_blocks_far_apart(isa, options):
    """Logits beyond what an exponent holds beside small, forbidden, and in several blocks equal ones."""
    vocab = 24577
    for dtype in (torch.float32, torch.bfloat16):
        logits, ids = case((8, vocab), dtype)
        logits[0, 9000:] += 1e6  # a row's blocks in different units
        logits[1, :9000] -= 1e6
        logits[2] *= 1e30
        logits[3, :9000] = -INF
        logits[4, 100:] = -INF
        logits[5] = 7.25
        logits[6, ::8192] = 50.0
        logits[7] *= 1e-30
        ids[:] = torch.where(torch.arange(8) % 2 == 0, logits.argmax(-1), torch.zeros_like(ids))
        ids[3] = 20000
        assert_within_bound(both(logits, ids, **options), logits, ids, **options)
        assert_gradient(logits[[0, 3, 4, 6, 7]], ids[[0, 3, 4, 6, 7]], **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sign", [0x0000, 0x8000], ids=["positive", "negative"])
def test_nan_of_either_sign_in_any_block(isa, dtype, sign):
    """16-bit logits are compared by their bits, where NaN would be the largest or the smallest of all."""
    quiet = 0x7FC0 if dtype == torch.bfloat16 else 0x7E00
    for vocab, place in ((70, 0), (5000, 4999), (20000, 3), (20000, 9000), (20000, 19999)):
        for shift in (0.0, 100.0):  # all below zero too
            logits, ids = case((3, vocab), dtype)
            logits = (logits - shift).contiguous()
            clean = both(logits, ids)
            logits.view(torch.int16)[1, place] = (quiet | sign) - (1 << 16 if sign else 0)
            for dirty, c in zip(both(logits, ids), clean, strict=True):
                assert dirty.isnan().tolist() == [False, True, False]
                contract.assert_bitwise(dirty[::2], c[::2])


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
def test_few_rows_many_rows_and_threads_agree(isa, options):
    """Few long rows are cut for the threads; their sums are those of a row that one thread adds up."""
    for dtype in DTYPES:
        logits, ids = case((7, 33000), dtype)
        floor = logits.float().amax(-1) - 6
        for given in (options, options | {"logit_floor": floor}):
            torch.set_num_threads(1)
            whole = both(logits, ids, **given)
            plain = rf.token_logprobs(logits, ids, **given)  # no entropy: the same log-probs
            contract.assert_bitwise(plain, whole[0])
            for threads in (2, 4):
                torch.set_num_threads(threads)
                rows = slice(3, 4)
                part = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
                for found, expected in zip(both(logits[rows], ids[rows], **part), whole, strict=True):
                    contract.assert_bitwise(found, expected[rows])


def test_backward_twice_adds_up(backend):
    """A retained graph gives the same gradient again, and .grad their sum."""
    logits, ids = case((4, 70))
    logits.requires_grad_()
    logp, entropy = both(logits, ids)
    loss = logp.sum() + entropy.sum()
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    contract.assert_bitwise(logits.grad, 2 * once)
