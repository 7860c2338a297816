"""What an integration says of itself: the names it replaces, and what must be true before it does."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Where float32 products may be of TF32's 11 or bfloat16's 8 bits.
_LIMITS = {"high": 2e-3, "medium": 0.02}


class PatchError(RuntimeError):
    """Why a package was left as it is, in one line."""


@dataclass(frozen=True)
class Case:
    """One comparison of a function with its replacement on the same tensors.

    run: calls the function it is given and returns, by name, what comes out, gradients included.
    tolerance: largest difference that rounding explains, of the largest number of a result.
    """

    name: str
    run: Callable[[Any], Mapping[str, torch.Tensor]]
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Point:
    """A name of another package, and what takes its place.

    target: dotted name of a function, class or method; a module's global under exactly this name.
    signature: `signature_hash` of the target as it was read.
    replacement: replacement(original) is what is put there; it calls the original for what it does not cover.
    cases: cases(device) are compared before anything is replaced.
    ours: the function of react_fast behind it, for the table.
    called: attribute of the target that has the signature; empty: the target itself.
    aliases: modules that bound the same object under any name get the replacement, too.
    """

    target: str
    signature: str
    replacement: Callable[[Any], Any]
    cases: Callable[[torch.device], list[Case]]
    ours: str
    called: str = ""
    aliases: bool = True


@dataclass(frozen=True)
class Integration:
    """The points of one package, for versions from `at_least` on and before `below`."""

    package: str
    distribution: str
    at_least: tuple[int, ...]
    below: tuple[int, ...]
    points: tuple[Point, ...]


def installed(integration: Integration) -> str | None:
    """The package's version, or None."""
    try:
        return importlib.metadata.version(integration.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def signature_hash(function: Any) -> str:
    """12 hex digits over names, kinds and defaults of a function's parameters.

    Annotations are left out, since Python versions print them differently.
    """
    parameters = inspect.signature(function).parameters.values()
    text = ", ".join(f"{p.kind.name} {p.name}{_default(p)}" for p in parameters)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"


def check_version(integration: Integration) -> None:
    """Raises PatchError unless the package is installed in a version that was read."""
    version = installed(integration)
    if version is None:
        raise PatchError(f"{integration.package} is not installed")
    release = tuple(map(int, re.findall(r"\d+", version)[: len(integration.at_least)]))
    if not integration.at_least <= release < integration.below:
        low, high = (".".join(map(str, part)) for part in (integration.at_least, integration.below))
        raise PatchError(f"{integration.package} {version} is not in the range >={low},<{high}")


def located(point: Point) -> tuple[Any, str, Any]:
    """(module or class, attribute, object) of a target; raises PatchError where there is none."""
    parts = point.target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            owner: Any = importlib.import_module(name)
            break
        except Exception as error:  # a package may fail on import in any way
            missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            if not missing or count == 1:
                raise PatchError(f"{name} cannot be imported: {_line(error)}") from error
    for part in parts[count:-1]:
        owner = getattr(owner, part, None)
    if parts[-1] not in getattr(owner, "__dict__", {}):
        raise PatchError(f"{point.target} does not exist")
    return owner, parts[-1], vars(owner)[parts[-1]]


def check_signature(point: Point, original: Any) -> None:
    """Raises PatchError unless the target takes what it took when it was read."""
    called = getattr(original, point.called, None) if point.called else original
    if not callable(called):
        raise PatchError(f"{point.target}.{point.called} does not exist")
    found = signature_hash(called)
    if found != point.signature:
        raise PatchError(
            f"{point.target} has another signature ({found}, read was {point.signature}): "
            f"{point.target.rpartition('.')[2]}({', '.join(inspect.signature(called).parameters)})"
        )


def check_parity(point: Point, original: Any, replacement: Any) -> None:
    """Raises PatchError unless both give the same numbers; leaves torch's random numbers and modes alone."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False)
        with modes[0], modes[1], modes[2], torch.device(device):
            for case in point.cases(device):
                _compare(point, case, original, replacement, device)


def _compare(point: Point, case: Case, original: Any, replacement: Any, device: torch.device) -> None:
    where = f"{point.target} with {case.name} on {device.type}"
    found = []
    for whose, function in (("the original", original), ("ours", replacement)):
        try:
            found.append(case.run(function))
        except Exception as error:
            raise PatchError(f"{where}: {whose} failed: {_line(error)}") from error
    theirs, ours = found
    for name, wanted in theirs.items():
        got = ours[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise PatchError(
                f"{where}: {name} is {got.dtype} {list(got.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
        far = difference(got, wanted)
        limit = max(case.tolerance, _LIMITS.get(torch.get_float32_matmul_precision(), 0.0))
        if not far <= limit:
            raise PatchError(f"{where}: {name} differs by {far:.1e}, more than {limit:.1e}")


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, of the largest finite number of `wanted`; inf where only one is finite."""
    a, b = got.double().flatten(), wanted.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b[b.isfinite()].abs()
    scale = max(float(finite.max()) if len(finite) else 0.0, 1e-30)
    far = torch.where(same, 0.0, (a - b).abs()) / scale
    return float(torch.nan_to_num(far, nan=float("inf")).max()) if len(far) else 0.0


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
