"""The table of ops: a function over torch tensors for each name, with what its parameters take."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_TENSORS = (Tensor, Tensor | None, list[Tensor])


@dataclass(frozen=True)
class Definition:
    """How an op is computed.

    Fields:
        run: Takes the parameters by position.
        defaults: Parameters in order, each with its default, or `REQUIRED`.
        tensors: Parameters that take tensors; the others take Python values.
        ignored: Inputs that promise something about the data and change no result.
        moves: It only moves or picks values, so that its result needs no rounding.
    """

    run: Callable[..., Any]
    defaults: Mapping[str, Any]
    tensors: frozenset[str]
    ignored: tuple[str, ...] = ()
    moves: bool = False


OPS: dict[str, Definition] = {}
REQUIRED = inspect.Parameter.empty


def op(
    *names: str, moves: bool = False, ignored: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Enter a function into the table; its annotations say which parameters are tensors."""

    def enter(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        defaults = {name: item.default for name, item in parameters.items()}
        tensors = frozenset(n for n, item in parameters.items() if item.annotation in _TENSORS)
        for name in names:
            OPS[name] = Definition(function, defaults, tensors, ignored, moves)
        return function

    return enter


def enter_all(
    functions: Mapping[str, Callable[..., Any]], *parameters: str, moves: bool = False
) -> None:
    """Enter functions that take only tensors, by position."""
    for name, function in functions.items():
        OPS[name] = Definition(
            function, dict.fromkeys(parameters, REQUIRED), frozenset(parameters), moves=moves
        )
