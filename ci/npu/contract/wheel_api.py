"""Names and signatures of a torch_npu wheel, read out of the closed file: nothing is imported or unpacked.

Python names come from its .py files, operators from the two yaml files that torch_npu is generated from.
"""

from __future__ import annotations

import ast
import re
import zipfile
from functools import cache, cached_property
from pathlib import Path

# Packages whose public names are kept. torch.npu is torch_npu.npu.
PACKAGES = {
    "torch.npu": "torch_npu.npu",
    "torch.npu.amp": "torch_npu.npu.amp",
    "torch_npu.optim": "torch_npu.optim",
    "torch_npu.profiler": "torch_npu.profiler",
}
YAML = ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")
# Kernels of torch's own operators that the training loops rely on: fused AdamW and fused attention.
TORCH_OPERATORS = ("_fused_adamw_", "scaled_dot_product_attention")


class WheelApi:
    """The API of one wheel file."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        self._files = set(self._archive.namelist())

    def signatures(self) -> dict[str, str]:
        """Signature by dotted name: every operator in torch.ops.npu, every public name of `PACKAGES`."""
        found = {f"torch.ops.npu.{name}": schema for name, schema in self.operators.items()}
        for name in TORCH_OPERATORS:
            if name in self.torch_operators:
                found[f"torch.ops.aten.{name}"] = "operator"
        for public, package in PACKAGES.items():
            for name in self._public_names(package):
                self._add(found, f"{public}.{name}", package, name)
        return dict(sorted(found.items()))

    @cached_property
    def operators(self) -> dict[str, str]:
        """Schemas of torch_npu's own operators, "(Tensor self) -> Tensor" by name."""
        return {name: schema for name, schema in self._functions if name.startswith(("npu_", "_npu_", "fast_gelu"))}

    @cached_property
    def torch_operators(self) -> set[str]:
        """Names, without overload, of torch's operators that have an npu kernel of their own."""
        listed = re.findall(r"^\s*-\s*(?:func:\s*)?([A-Za-z_]\w*)(?:\.\w+)?\s*(?:\(|$)", self._yaml, re.MULTILINE)
        return set(listed) - set(self.operators)

    @cached_property
    def _functions(self) -> list[tuple[str, str]]:
        return re.findall(r"^\s*-?\s*func:\s*(\w+)(\(.*->.*?)\s*$", self._yaml, re.MULTILINE)

    @cached_property
    def _yaml(self) -> str:
        return "\n".join(self._archive.read(f"torch_npu/csrc/aten/{name}").decode() for name in YAML)

    # -- Python names -------------------------------------------------------------------------------------------------

    def _add(self, found: dict[str, str], public: str, module: str, name: str) -> None:
        """Adds a name's signature; of an object that only takes options, such as torch.npu.config, each option."""
        node = self._resolve(module, name)
        if isinstance(node, ast.FunctionDef):
            found[public] = f"({ast.unparse(node.args)})"
        elif isinstance(node, ast.ClassDef):
            found[public] = self._class_signature(node)
            for member in node.body:
                if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
                    found[f"{public}.{member.targets[0].id}"] = "value"
        elif isinstance(node, ast.Assign):
            found[public] = "value"
            for option in self._options(module, node):
                found[f"{public}.{option}"] = "value"
        else:  # of the compiled part, or a submodule
            found[public] = "value"

    @staticmethod
    def _class_signature(node: ast.ClassDef) -> str:
        """Of its constructor without self; (*args, **kwargs) where that is inherited."""
        for name in ("__init__", "__new__"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == name:
                    _, _, others = ast.unparse(member.args).partition(",")
                    return f"({others.strip()})"
        return "(*args, **kwargs)"

    def _options(self, module: str, node: ast.Assign) -> list[str]:
        """Names that the assigned object's __setattr__ compares with: it silently ignores all others."""
        if not isinstance(node.value, ast.Call):
            return []
        name = ast.unparse(node.value.func).rsplit(".", 1)[-1]
        definitions = [self._resolve(place, name) for place in self._star_modules(module)]
        made = next((found for found in definitions if isinstance(found, ast.ClassDef)), None)
        if made is None:
            return []
        setter = [m for m in made.body if isinstance(m, ast.FunctionDef) and m.name == "__setattr__"]
        compared = [c for m in setter for c in ast.walk(m) if isinstance(c, ast.Compare)]
        return [c.comparators[0].value for c in compared if isinstance(c.comparators[0], ast.Constant)]

    def _star_modules(self, module: str) -> list[str]:
        """The modules that an instance's class may come from: those whose names are imported here with a star."""
        names = [module]
        for node in self._tree(module).body:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                names.append(self._absolute(module, node))
        return [name for name in names if self._file(name)][::-1]

    @cache  # noqa: B019  one object a wheel, read once
    def _resolve(self, module: str, name: str) -> ast.AST | None:
        """The definition behind a name of a module, through imports; None where the wheel has none."""
        if self._file(module) is None:
            return None
        stars = []
        for node in _statements(self._tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name and source.startswith("torch_npu"):
                        submodule = f"{source}.{alias.name}"
                        return self._tree(submodule) if self._file(submodule) else self._resolve(source, alias.name)
        return next((node for star in stars if (node := self._resolve(star, name)) is not None), None)

    def _public_names(self, module: str) -> list[str]:
        """Names without a leading underscore that a module defines or imports from its own package, and its __all__."""
        names = set()
        listed: set[str] = set()
        for node in _statements(self._tree(module)):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                listed |= {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                if source.startswith("torch_npu") and self._file(source):
                    starred = node.names[0].name == "*"
                    names |= set(self._public_names(source)) if starred else {a.asname or a.name for a in node.names}
        return sorted({name for name in names if not name.startswith("_")} | listed)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        is_package = (self._file(module) or "").endswith("/__init__.py")
        parts = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _file(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}/__init__.py", f"{base}.py") if path in self._files), None)

    @cache  # noqa: B019
    def _tree(self, module: str) -> ast.Module:
        return ast.parse(self._archive.read(self._file(module)))


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Top-level statements, those inside `if` and `try` too, last first: a later definition replaces an earlier one."""
    found: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        found.append(node)
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                waiting += getattr(node, block, [])
    return found[::-1]
