"""Which implementation runs, and that an explicit choice is never replaced silently."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import react_fast as rf
from react_fast import _core, kernels
from react_fast.ops import backend


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter with only these react_fast and Triton settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("REACT_FAST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )


CALL = "import torch, react_fast as rf; rf.attribution_scores(torch.ones(2, 3), torch.ones(2, 3)); "


def test_use_backend_restores_the_previous_choice():
    assert rf.get_backend() == "auto"
    with rf.use_backend("reference"):
        assert rf.get_backend() == "reference"
        with pytest.raises(KeyError), rf.use_backend("cpu"):
            raise KeyError
        assert rf.get_backend() == "reference"
    assert rf.get_backend() == "auto"


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton, got 'cuda'"):
        rf.set_backend("cuda")
    assert rf.get_backend() == "auto"


def test_auto_runs_the_core_on_cpu_and_triton_on_cuda():
    assert backend.resolve("cpu") == "cpu"
    assert backend.resolve("cuda") == "triton"


def test_cpu_backend_refuses_cuda_tensors():
    with (
        rf.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' needs CPU tensors, got cuda"),
    ):
        backend.resolve("cuda")


def test_triton_backend_on_cpu_needs_the_interpreter():
    finished = _python(CALL, REACT_FAST_BACKEND="triton")
    assert finished.returncode != 0
    assert "backend 'triton' needs CUDA tensors, got cpu" in finished.stderr


def test_environment_chooses_the_backend():
    finished = _python(CALL + "print(rf.get_backend())", REACT_FAST_BACKEND="reference")
    assert finished.stdout.strip() == "reference"
    refused = _python("import react_fast", REACT_FAST_BACKEND="gpu")
    assert "REACT_FAST_BACKEND must be one of auto, reference, cpu, triton, got 'gpu'" in refused.stderr


@pytest.mark.parametrize("name", _core.supported_isas())
def test_environment_forces_the_instruction_set(name):
    finished = _python("from react_fast import _core; print(_core.isa())", REACT_FAST_ISA=name)
    assert finished.stdout.strip() == name


def test_wrong_instruction_set_is_one_line():
    finished = _python("import react_fast", REACT_FAST_ISA="sse9")
    assert "REACT_FAST_ISA must be one of baseline" in finished.stderr
    assert "got 'sse9'" in finished.stderr


def test_best_supported_set_is_the_default():
    finished = _python("from react_fast import _core; print(_core.isa(), _core.supported_isas()[-1])")
    active, best = finished.stdout.split()
    assert active == best
    assert set(_core.supported_isas()) <= set(_core.compiled_isas())


def test_every_op_is_registered_with_fake_kernel():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        out = torch.ops.react_fast.attribution_scores(torch.empty(4, 8), torch.empty(4, 8), 0)
    assert tuple(out.shape) == (4,)
    assert "attribution_scores" in backend.registered_ops()


def test_compiled_graph_follows_the_backend():
    """torch.compile guards on the choice: the same compiled function serves every backend."""
    compiled = torch.compile(lambda g, a: rf.attribution_scores(g, a), fullgraph=True, backend="aot_eager")
    grad, activation = torch.randn(3, 5), torch.randn(3, 5)
    for name in ("auto", "cpu", "triton", "reference"):
        with rf.use_backend(name):
            torch.testing.assert_close(compiled(grad, activation), (grad * activation).sum(-1))


VECTOR = torch.linspace(-1, 2, 12, dtype=torch.float64)
DIFFERENTIABLE = {
    "token_logprobs": lambda x: rf.token_logprobs(x.view(3, 4), torch.tensor([0, 3, 1])),
    "gae": lambda x: rf.gae(x.view(3, 4), x.view(3, 4) ** 2, gamma=0.9, lam=0.8)[0],
    "reverse_linear_scan": lambda x: rf.reverse_linear_scan(x.view(3, 4), x.view(3, 4)),
    "group_advantages": lambda x: rf.group_advantages(x, torch.arange(12) // 4),
    "whiten": lambda x: rf.whiten(x),
    "attribution_scores": lambda x: rf.attribution_scores(x.view(3, 4), x.view(3, 4)),
    "segment_sum": lambda x: rf.segment_sum(x, torch.tensor([0, 5, 12])),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_batched_gradients(op):
    """torch.autograd.grad(is_grads_batched=True), which hands the backward tensors without storage."""
    function = DIFFERENTIABLE[op]
    rows = torch.autograd.functional.jacobian(function, VECTOR)
    batched = torch.autograd.functional.jacobian(function, VECTOR, vectorize=True)
    torch.testing.assert_close(batched, rows, rtol=0, atol=0)


FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
}


def _without_device(file: Path) -> list[str]:
    """Calls of torch's factories that follow torch.set_default_device instead of the op's tensors."""
    return [
        f"{file.name}:{node.lineno}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("torch", name) for name in FACTORIES}
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_what_ops_make_names_its_device():
    files = [*Path(rf.ops.__file__).parent.glob("*.py"), *Path(kernels.__file__).parent.glob("*.py")]
    assert [place for file in files for place in _without_device(file)] == []
