"""An environment's rules in a user's module: functions marked with `@reward`, `@transition` and `@terminal`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from .reward_functions import is_reward

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_react_fast_rule"


def transition(function: F) -> F:
    """Marks f(state, action, record) -> next state. The function stays as it is.

    Raises: TypeError if it does not take three arguments.
    """
    return _marked(function, "transition", ("state", "action", "record"))


def terminal(function: F) -> F:
    """Marks terminal(next_state, record) -> bool. The function stays as it is.

    Raises: TypeError if it does not take two arguments.
    """
    return _marked(function, "terminal", ("next_state", "record"))


class Rules(NamedTuple):
    """What a module has: its rewards in the order of their definition, f and `terminal`, or None."""

    rewards: tuple[Callable[..., Any], ...]
    transition: Callable[..., str] | None
    terminal: Callable[..., bool] | None


def rules_of(module: Any) -> Rules:
    """The marked functions of a module.

    Raises: TypeError if it is no module; ValueError if it has none, or two for what there is one of.
    """
    if not inspect.ismodule(module):
        raise TypeError(f"module must be a module, got {type(module).__name__}")
    members = list({id(member): member for member in vars(module).values() if callable(member)}.values())
    found: dict[str, Any] = {}
    for kind in ("transition", "terminal"):
        marked = [member for member in members if getattr(member, _MARK, None) == kind]
        if len(marked) > 1:
            names = " and ".join(getattr(member, "__name__", repr(member)) for member in marked[:2])
            raise ValueError(f"{module.__name__} must mark one function with @{kind}, got {names}")
        found[kind] = marked[0] if marked else None
    rules = Rules(tuple(member for member in members if is_reward(member)), **found)
    if not any(rules):
        raise ValueError(f"{module.__name__} marks no function with @reward, @transition or @terminal")
    return rules


def _marked(function: F, kind: str, arguments: tuple[str, ...]) -> F:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{kind} must take ({', '.join(arguments)}), got {getattr(function, '__name__', function)!r}"
        ) from None
    setattr(function, _MARK, kind)
    return function
