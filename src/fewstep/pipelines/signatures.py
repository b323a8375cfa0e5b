"""The public `__call__` of each pipeline, made of a task and a line that lists its arguments.

The lines hold names in diffusers' order, so that positional calls work, and the defaults that
differ from `Request`'s. Arguments behind `*` are ours and go by keyword only.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .arguments import MEANINGS, hint
from .families import Assignment
from .request import Request


def call(
    task: Callable[[Any, Any], Any], arguments: str, kind: type[Request] = Request
) -> Callable[..., Any]:
    """A pipeline's `__call__`: binds `arguments` to a Request of `kind`, which `task` gets.

    An unknown keyword is a TypeError that says what may have been meant. Its attribute `assigned`
    takes the same arguments and gives the Assignment, for who runs the loop himself.
    """
    signature = signature_of(arguments, kind)
    names = [name for name in signature.parameters if name != "self"]

    def assigned(*args: Any, **kwargs: Any) -> Any:
        """What the task makes of a call, before any step is taken."""
        pipe = args[0]
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{type(pipe).__name__} got an unknown argument {name!r}{hint(name, names)}"
                )
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = dict(bound.arguments)
        return task(asked.pop("self"), kind.asked(**asked))

    def __call__(*args: Any, **kwargs: Any) -> Any:
        made = assigned(*args, **kwargs)
        return args[0].generate(made) if isinstance(made, Assignment) else made

    __call__.assigned = assigned  # type: ignore[attr-defined]
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    __call__.__doc__ = docstring(task, names)
    return __call__


def signature_of(arguments: str, kind_of: type[Request] = Request) -> inspect.Signature:
    """The signature that a line such as "prompt num_inference_steps=4 * seed" describes.

    Defaults that the line does not give are those of the fields of `kind_of`.
    """
    known = {field.name: field for field in fields(kind_of)}
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for entry in arguments.split():
        if entry == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        name, _, value = entry.partition("=")
        default = ast.literal_eval(value) if value else known[name].default
        annotation = known[name].type if name in known else type(default).__name__
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    return inspect.Signature(parameters)


def docstring(task: Callable[[Any, Any], Any], names: list[str]) -> str:
    """The task's docstring with its arguments explained."""
    lines = [
        textwrap.fill(
            f"{name}: {MEANINGS[name]}", 96, initial_indent="    ", subsequent_indent=" " * 8
        )
        for name in names
    ]
    raises = "Raises RequestError, before any work, for a value that cannot be served."
    return "\n".join([inspect.cleandoc(task.__doc__ or ""), "", "Args:", *lines, "", raises])
