"""What the kernels' notes say of bytes and FLOPs is what the benchmarks count."""

from ast import get_docstring, parse
from pathlib import Path

import pytest

from bench import roofline
from bench.gpu import launches

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", roofline.NOTES)
def test_notes_agree_with_what_the_suite_computes(path: str) -> None:
    note = " ".join((get_docstring(parse((ROOT / "kernels" / f"{path}.py").read_text())) or "").split())
    for said in roofline.NOTES[path]:
        assert said in note, f"kernels/{path}.py's roofline does not say {said!r}"


def test_every_kernel_file_has_a_counted_note() -> None:
    """But the one that is another's few-row form, whose note refers to it."""
    assert launches.kernels().keys() - roofline.NOTES.keys() == {"linear_logprob_few"}


def test_the_slower_of_moving_and_computing_is_the_limit() -> None:
    work = roofline.linear_token_logprobs(8, 4, 16, 2)
    assert (work.bytes, work.flops) == ((8 + 16) * 4 * 2, 2 * 8 * 4 * 16)
    assert work.seconds(192.0, 1024.0) == 1.0
    assert work.seconds(96.0, 1024.0) == 2.0
    assert work.seconds(192.0, 256.0) == 4.0
    both = roofline.row_states(2) + roofline.policy_loss(2)
    assert (both.path, both.bytes) == ("sequence_objectives", 2 * 17 + 2 * 17)
