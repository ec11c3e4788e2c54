"""Whether a call fits a signature: a Python parameter list, or an operator schema of torch."""

from __future__ import annotations

import ast
import re

from ci.npu.contract.uses import Use


def problem(use: Use, signature: str) -> str | None:
    """Why the call does not fit, in words; None where it does.

    Args:
        use: the call; one without arguments known (not a call) fits everything.
        signature: "(device=None, *, index)", "(Tensor self, *, float p=0.1) -> Tensor", or "value" of an option or
            constant, which cannot be called.
    """
    if use.positional is None:
        return None
    if not signature.startswith("("):
        return "is not a function"
    positional, keyword_only, required, takes_more, takes_any = _parameters(signature)
    if use.positional > len(positional) and not takes_more:
        return f"takes {len(positional)} positional arguments, not {use.positional}"
    unknown = [name for name in use.keywords if name not in positional + keyword_only]
    if unknown and not takes_any:
        return f"has no argument {', '.join(unknown)}"
    twice = [name for name in use.keywords if name in positional[: use.positional]]
    if twice:
        return f"gets {', '.join(twice)} twice"
    missing = [name for name in required if name not in positional[: use.positional] and name not in use.keywords]
    if missing and not use.is_open:
        return f"needs {', '.join(missing)}"
    return None


def _parameters(signature: str) -> tuple[list[str], list[str], list[str], bool, bool]:
    """(positional names, keyword-only names, names without default, has *args, has **kwargs)."""
    if " -> " in signature:
        return _schema_parameters(signature)
    arguments = ast.parse(f"def f{signature}: 0").body[0].args
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    keyword_only = [a.arg for a in arguments.kwonlyargs]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [a.arg for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is None]
    return positional, keyword_only, required, arguments.vararg is not None, arguments.kwarg is not None


def _schema_parameters(schema: str) -> tuple[list[str], list[str], list[str], bool, bool]:
    inside = schema.rsplit(" -> ", 1)[0].strip()[1:-1]
    positional, keyword_only, required = [], [], []
    names = positional
    for part in re.split(r",\s*(?![^\[(\"]*[\])])", inside):  # not the commas of int[2]=[0, 0]
        if part.strip() == "*":
            names = keyword_only
        elif part.strip():
            declaration, equals, _ = part.partition("=")
            names.append(declaration.split()[-1])
            if not equals:
                required.append(names[-1])
    return positional, keyword_only, required, False, False
