"""Which implementation of an op runs, and how an op reaches torch.

    auto       the compiled core for CPU tensors, Triton for CUDA tensors
    reference  react_fast.reference: plain torch, autograd, any device
    cpu        the compiled core; CPU tensors only
    triton     the Triton kernels; CUDA tensors, or CPU tensors under TRITON_INTERPRET=1

An explicit backend that cannot run raises; `auto` never falls back silently. The choice is one value for the
process (set it before starting threads), so that torch.compile can guard on it.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")

# The tags of csrc/dtype.h.
DTYPE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int32: 4,
    torch.int64: 5,
}

Implementation = Callable[..., Any]

_SCALARS = frozenset((type(None), bool, int, float, str, list))
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))

_library = torch.library.Library("react_fast", "FRAGMENT")
_OPS: list[str] = []


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_current = _validated(os.environ.get("REACT_FAST_BACKEND", "auto"), "REACT_FAST_BACKEND")


def get_backend() -> str:
    """The backend that set_backend, use_backend or REACT_FAST_BACKEND chose; "auto" by default."""
    return _current


def set_backend(name: str) -> None:
    """Choose the backend of every op of this process.

    Args:
        name: "auto" | "reference" | "cpu" | "triton".
    Raises: ValueError for another name. A backend that cannot run on an op's tensors raises at the call.
    """
    global _current
    _current = _validated(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` inside a with block; the previous choice comes back at its end."""
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def use_reference() -> bool:
    return _current == "reference"


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(device_type: str) -> str:
    """ "cpu" or "triton": what runs an op on tensors of this device under the current backend."""
    if _current == "triton":
        if device_type == "cpu" and not interpreting():
            raise RuntimeError(
                "backend 'triton' needs CUDA tensors, got cpu; set TRITON_INTERPRET=1 before importing "
                "react_fast to run the kernels on the CPU"
            )
        return "triton"
    if _current == "cpu" and device_type != "cpu":
        raise RuntimeError(f"backend 'cpu' needs CPU tensors, got {device_type}; use backend 'auto'")
    return "cpu" if device_type == "cpu" else "triton"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op accumulates in and returns: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _watched() -> bool:
    """Someone wants to see every call: the compiler, a dispatch mode, a function transform, the profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def _plain(args: tuple) -> bool:
    """Tensors that are no subclass, and not meta."""
    for x in args:
        kind = type(x)
        if kind not in _SCALARS and kind not in _TENSORS:
            return False
    return not args[0].is_meta


def is_eager(x: torch.Tensor) -> bool:
    """A tensor of ordinary eager torch, with nobody watching."""
    return _plain((x,)) and not _watched()


def _needs_grad(args: tuple) -> bool:
    return any(type(x) in _TENSORS and x.requires_grad for x in args)


class _Once(torch.autograd.Function):
    """Gradients as they are, which depend on `tensors[count:]` by a derivative that nobody has."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> Any:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(
            "a fused head of react_fast can be differentiated once; for second derivatives take log_softmax of "
            'the logits, or react_fast.use_backend("reference")'
        )


def once_differentiable(backward: Implementation) -> Implementation:
    """torch's decorator with a line that says what to do, and also where the upstream gradient is a constant:
    there torch's lets a penalty on the gradient vanish without a word.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # no create_graph=True
            return found
        gradients = [x.detach().requires_grad_() for x in found if x is not None]
        sources = [x for x in (*upstream, *ctx.saved_tensors) if x is not None and x.requires_grad]
        marked = iter(_Once.apply(len(gradients), *gradients, *sources))
        return tuple(None if x is None else next(marked) for x in found)

    return run


def register(
    name: str,
    schema: str,
    *,
    cpu: Implementation,
    triton: Implementation,
    fake: Implementation,
    setup_context: Implementation | None = None,
    backward: Implementation | None = None,
) -> Any:
    """Define torch.ops.react_fast.<name> and return its overload.

    The low-level registration (define, impl, fake, autograd) costs 6 us a call without gradient and 75 us with
    one; torch.library.custom_op costs 93 us. An eager call that nobody wants to see goes straight to the
    implementation, 1 us, or through an autograd function of the same two halves, 8 us.

    Args:
        name: operator name.
        schema: the part of the schema behind the name, "(Tensor x, ...) -> Tensor".
        cpu, triton: implementations with the schema's arguments; the first argument's device decides.
        fake: shapes and dtypes of the result, for meta tensors and torch.compile.
        setup_context, backward: autograd, as torch.library.register_autograd takes them.
    """

    def run(*args: Any) -> Any:
        return (cpu if resolve(args[0].device.type) == "cpu" else triton)(*args)

    _library.define(name + schema)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"react_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"react_fast::{name}", backward, setup_context=setup_context, lib=_library
        )
    _OPS.append(name)
    overload = getattr(torch.ops.react_fast, name).default

    if backward is None:  # called by autograd, which may batch the gradients it passes
        return overload

    assert setup_context is not None
    setup: Implementation = setup_context
    differentiate = backward

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # a setup_context of its own costs torch 10 us
            outputs = run(*args)
            setup(ctx, args, outputs)
            return outputs

        backward = staticmethod(differentiate)

    # Function.apply without its look at every argument for wrappers that torch.func has left behind, 4 us.
    apply = super(torch.autograd.Function, Eager).apply

    def call(*args: Any) -> Any:
        if _watched() or not _plain(args):
            return overload(*args)
        return apply(*args) if torch.is_grad_enabled() and _needs_grad(args) else run(*args)

    return call


def registered_ops() -> tuple[str, ...]:
    """Names of the operators under torch.ops.react_fast."""
    return tuple(_OPS)
