"""The patch manager, on a package made here: checked first, all names or none, and back to the same objects."""

import dataclasses
import importlib.abc
import logging
import sys
import threading
import types

import pytest
import torch

import react_fast as rf
from react_fast.integrations import PatchError, is_patched, patching, points
from react_fast.integrations.points import Case, Integration, Point, signature_hash
from react_fast.integrations.table import table_lines


class Theirs:
    """In a class, since a global of this module that is the original would be replaced, too."""

    @staticmethod
    def double(x, scale=2.0):
        return x * scale

    @staticmethod
    def square(x):
        return x * x


class Buffer:
    def fill(self, x):
        return x + 1


def _cases(call):
    def run(function):
        x = torch.linspace(-1, 1, 5).requires_grad_()
        y = call(function, x)
        return {"value": y.detach(), "gradient": torch.autograd.grad(y.sum(), x)[0]}

    return lambda device: [Case("five numbers", run)]


def _point(place, function, replacement, call=lambda f, x: f(x), **options):
    return Point(place, signature_hash(function), replacement, _cases(call), "ours", **options)


def _ours(original):
    return lambda *args: original(*args)


@pytest.fixture
def package(monkeypatch):
    """`peer` with two functions, which `peer.user` imported by name, and a class with a method."""
    peer, user = types.ModuleType("peer"), types.ModuleType("peer.user")
    peer.double, peer.square, peer.Buffer = Theirs.double, Theirs.square, Buffer
    user.twice, user.square = Theirs.double, Theirs.square
    for module in (peer, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    made = Integration(
        package="peer",
        distribution="peer-dist",
        at_least=(1, 2),
        below=(2, 0),
        points=(
            _point("peer.double", Theirs.double, _ours),
            _point("peer.square", Theirs.square, _ours, aliases=False),
            _point("peer.Buffer.fill", Buffer.fill, _ours, lambda f, x: f(None, x), aliases=False),
        ),
    )
    found = {"peer": made, "version": "1.2.3"}

    def version(name):
        if found["version"] is None:
            raise points.importlib.metadata.PackageNotFoundError(name)
        return found["version"] if name == "peer-dist" else pytest.fail(name)

    monkeypatch.setattr(patching, "find", lambda name: found["peer"])
    monkeypatch.setattr(points.importlib.metadata, "version", version)
    monkeypatch.setattr(patching, "_told", set())
    # Of the thousands of modules that other tests have imported none is looked through.
    monkeypatch.setattr(patching, "sys", types.SimpleNamespace(modules={"peer": peer, "peer.user": user}))
    monkeypatch.delenv("REACT_FAST_DISABLE", raising=False)
    yield types.SimpleNamespace(peer=peer, user=user, found=found)
    rf.unpatch("peer")


def _names(package):
    return {
        **{f"peer.{name}": x for name, x in vars(package.peer).items() if not name.startswith("__")},
        **{f"peer.user.{name}": x for name, x in vars(package.user).items() if not name.startswith("__")},
        "fill": vars(Buffer)["fill"],
    }


def _change(package, index, **changes):
    parts = list(package.found["peer"].points)
    parts[index] = dataclasses.replace(parts[index], **changes)
    package.found["peer"] = dataclasses.replace(package.found["peer"], points=tuple(parts))


def test_every_name_is_replaced_and_put_back_as_it_was(package):
    before = _names(package)
    rf.patch("peer")
    during = _names(package)
    changed = {name for name in before if during[name] is not before[name]}
    assert changed == {"peer.double", "peer.user.twice", "peer.square", "fill"}  # square's alias stays
    assert during["peer.double"] is during["peer.user.twice"]
    rf.unpatch("peer")
    assert all(_names(package)[name] is before[name] for name in before)


def test_a_module_that_imported_ours_gets_the_original_back(package):
    rf.patch("peer")
    package.user.late = package.peer.square
    rf.unpatch("peer")
    assert package.user.late is Theirs.square


def test_one_line_a_name_is_logged(package, caplog):
    with caplog.at_level(logging.INFO, logger="react_fast"):
        rf.patch("peer")
    told = [record.getMessage().split()[0] for record in caplog.records]
    assert sorted(told) == ["peer.Buffer.fill", "peer.double", "peer.square", "peer.user.twice"]


def test_contexts_nest_and_the_outermost_takes_back(package):
    with rf.patch("peer"):
        ours = package.peer.double
        with rf.patch("peer"):
            assert package.peer.double is ours
        assert package.peer.double is ours  # patching twice changed nothing, and neither did leaving
    assert package.peer.double is Theirs.double
    with pytest.raises(KeyError), rf.patch("peer"):
        raise KeyError
    assert package.peer.double is Theirs.double
    rf.unpatch("peer")  # of what is not patched: nothing


def test_a_context_that_is_entered_again_patches_again(package):
    context = rf.patch("peer")
    for _ in range(2):
        with context:
            assert package.peer.double is not Theirs.double
            with context:
                assert is_patched("peer")
            assert is_patched("peer")  # left by the outer of the two
        assert package.peer.double is Theirs.double is package.user.twice
    with context:
        rf.unpatch("peer")
        with context:
            assert package.peer.double is not Theirs.double
    assert package.peer.double is Theirs.double


def test_a_context_entered_again_within_another_s_patch_leaves_it(package):
    context = rf.patch("peer")
    with context:
        pass
    with rf.patch("peer"):
        with context:
            pass
        assert is_patched("peer")
    assert package.peer.double is Theirs.double


def _another_signature(package):
    package.peer.square = lambda x, more=1: x * x * more


def _other_numbers(package):
    _change(package, 2, replacement=lambda original: lambda self, x: x + 1.001)


def _other_gradient(package):
    _change(package, 2, replacement=lambda original: lambda self, x: x.detach() + 1 + 0 * x)


def _other_dtype(package):
    _change(package, 2, replacement=lambda original: lambda self, x: (x + 1).double())


def _broken_import(package):
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "nopeer":
                sys.meta_path.remove(self)
                raise ZeroDivisionError("no")

    sys.meta_path.insert(0, Finder())
    _change(package, 1, target="nopeer.square")


def _failing(package):
    def fail(self, x):
        raise ZeroDivisionError("nothing\nworks")

    _change(package, 2, replacement=lambda original: fail)


REFUSALS = {
    "missing": (lambda p: p.found.update(version=None), r"peer is not installed"),
    "too old": (lambda p: p.found.update(version="1.1.9"), r"peer 1\.1\.9 is not in the range >=1\.2,<2\.0"),
    "too new": (lambda p: p.found.update(version="2.0.0rc1"), r"peer 2\.0\.0rc1 is not in the range"),
    "attribute gone": (lambda p: delattr(p.peer, "square"), r"peer\.square does not exist"),
    "module gone": (lambda p: _change(p, 1, target="peer.gone.square"), r"peer\.gone\.square does not exist"),
    "package broken": (lambda p: _change(p, 1, target="nopeer.square"), r"nopeer cannot be imported"),
    "signature": (_another_signature, r"peer\.square has another signature .* square\(x, more\)$"),
    "numbers": (_other_numbers, r"peer\.Buffer\.fill with five numbers on cpu: value differs by "),
    "gradient": (_other_gradient, r"gradient differs by 1\.0e\+00"),
    "dtype": (_other_dtype, r"value is torch\.float64 \[5\], not torch\.float32 \[5\]"),
    "import fails": (_broken_import, r"nopeer cannot be imported: ZeroDivisionError: no$"),
    "exception": (_failing, r"ours failed: ZeroDivisionError: nothing works$"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_any_failure_leaves_every_name(package, why):
    spoil, message = REFUSALS[why]
    spoil(package)
    before = _names(package)
    with pytest.raises(PatchError, match=message) as caught:
        rf.patch("peer")
    assert "\n" not in str(caught.value)
    after = _names(package)
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert not is_patched("peer")


def test_a_name_that_cannot_be_set_takes_back_the_others(package):
    class Frozen(types.ModuleType):
        def __setattr__(self, name, value):
            if name == "square":
                raise TypeError("frozen")
            super().__setattr__(name, value)

    package.peer.__class__ = Frozen
    with pytest.raises(PatchError, match=r"peer\.square cannot be replaced: frozen"):
        rf.patch("peer")
    assert package.peer.double is package.user.twice is Theirs.double


def test_what_another_replaced_since_is_left(package, caplog):
    rf.patch("peer")
    package.peer.square = other = lambda x: x
    rf.unpatch("peer")
    assert package.peer.square is other
    assert package.peer.double is Theirs.double
    assert "peer.square was replaced again" in caplog.text


@pytest.mark.parametrize("value", ["1", "True", "peer", "trl, peer"])
def test_the_environment_disables(package, monkeypatch, caplog, value):
    monkeypatch.setenv("REACT_FAST_DISABLE", value)
    with rf.patch("peer"), rf.patch("peer"):
        assert package.peer.double is Theirs.double
    assert caplog.text.count("peer is left as it is: REACT_FAST_DISABLE") == 1


@pytest.mark.parametrize("value", ["", "0", "trl"])
def test_the_environment_does_not_disable(package, monkeypatch, value):
    monkeypatch.setenv("REACT_FAST_DISABLE", value)
    with rf.patch("peer"):
        assert package.peer.double is not Theirs.double


def test_threads_patch_once(package):
    start = threading.Barrier(8)

    def work():
        start.wait()
        rf.patch("peer")

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rf.unpatch("peer")
    assert package.peer.double is package.user.twice is Theirs.double


def test_random_numbers_of_the_user_are_left(package):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    rf.patch("peer")
    assert torch.equal(torch.rand(3), wanted)


def test_signatures_are_told_by_names_kinds_and_defaults():
    def plain(a: int, *, b=1.0) -> int: ...
    def same(a: "list[int] | None", *, b: float = 1.0): ...
    def renamed(c, *, b=1.0): ...
    def positional(a, b=1.0): ...
    def other_default(a, *, b=2.0): ...

    assert signature_hash(plain) == signature_hash(same)
    others = {signature_hash(f) for f in (plain, renamed, positional, other_default)}
    assert len(others) == 4


def test_the_table_tells_the_state(package, monkeypatch):
    assert table_lines(["peer"])[1].split() == ["peer", "1.2.3", "double", "ours", "available"]
    rf.patch("peer")
    assert table_lines(["peer"])[1].endswith("patched")
    rf.unpatch("peer")
    package.found["version"] = "3.0"
    assert table_lines(["peer"])[2].endswith("refused: peer 3.0 is not in the range >=1.2,<2.0")
    package.found["version"] = None
    assert table_lines(["peer"])[3].split() == ["peer", "-", "Buffer.fill", "ours", "package", "missing"]


def test_a_context_leaves_the_patch_of_a_later_call(package):
    first = rf.patch("peer")
    rf.unpatch("peer")
    rf.patch("peer")
    with first:
        pass
    assert is_patched("peer")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'TRL'; trl\?$"):
        rf.patch("TRL")
    with pytest.raises(ValueError, match=r"got None$"):
        rf.patch(None)
    with pytest.raises(ValueError, match=r"^name must be one of .*, got 'tlr'; trl\?$"):
        rf.patch("tlr")
