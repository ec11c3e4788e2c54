"""Every use of torch_npu in this repository's sources, found by reading them as syntax trees.

A new use is found, and so checked, by itself: nothing has to be registered.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("common", "ViT_for_PyTorch", "Beit2_for_PyTorch", "CLIP_for_PyTorch", "Data2vec_for_PyTorch", "ci/peers")
PREFIXES = ("torch_npu.", "torch.npu.", "torch.ops.npu.")
# Functions of torch that are meant to reach a kernel of torch_npu's own: without it they would be slow, not wrong.
IMPLIED = {"torch.nn.functional.scaled_dot_product_attention": "torch.ops.aten.scaled_dot_product_attention"}
FUSED_OPTIMIZER = "torch.ops.aten._fused_adamw_"  # of every call with fused=True; all of ours are AdamW


@dataclass(frozen=True)
class Use:
    """One place that names something of torch_npu.

    Attributes:
        where: `path:line`, the path from the repository's root.
        name: dotted, as torch.npu.set_device, torch_npu.optim.X or torch.ops.npu.npu_fast_gelu.
        positional: number of positional arguments; None where the name is read or set but not called.
        keywords: names of keyword arguments.
        is_open: whether *args or **kwargs hide some of the arguments.
    """

    where: str
    name: str
    positional: int | None = None
    keywords: tuple[str, ...] = ()
    is_open: bool = False


def repository_uses() -> list[Use]:
    """The uses in all sources, without tests."""
    uses = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if "test" not in relative.parts:
                uses += uses_in(path.read_text(encoding="utf-8"), str(relative))
    return uses


def uses_in(source: str, path: str = "") -> list[Use]:
    """The uses in one source text, in the order of lines."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    found = _Collector(path, names)
    found.visit(tree)
    return found.uses


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(local name, dotted name) of imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


class _Collector(ast.NodeVisitor):
    """Collects uses; knows what local variables stand for the `torch.npu` module within their function."""

    def __init__(self, path: str, names: dict[str, str]):
        self.path, self.names = path, names
        self.uses: list[Use] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.names = self.names, dict(self.names)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                if dotted := self.dotted(inner.value):
                    self.names[inner.targets[0].id] = dotted
        self.generic_visit(node)
        self.names = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names if node.module and node.level == 0 else ():
            self.add(node, f"{node.module}.{alias.name}")

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        if any(k.arg == "fused" and isinstance(k.value, ast.Constant) and k.value.value for k in node.keywords):
            self.uses.append(Use(f"{self.path}:{node.lineno}", FUSED_OPTIMIZER))
        if name is not None and self.is_use(name):
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            hidden = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            positional = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            self.add(node, name, positional, keywords, hidden)
            for part in (*node.args, *node.keywords):
                self.visit(part)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.dotted(node)
        if name in IMPLIED:
            self.uses.append(Use(f"{self.path}:{node.lineno}", IMPLIED[name]))
        elif name is not None and self.is_use(name):
            self.add(node, name)
        else:
            self.generic_visit(node)

    def add(self, node: ast.AST, name: str, *arguments) -> None:
        name = name.replace("torch_npu.npu.", "torch.npu.", 1)
        if name.startswith("torch.ops.npu."):
            name = ".".join(name.split(".")[:4])  # without an overload such as .default
        if self.is_use(name):
            self.uses.append(Use(f"{self.path}:{node.lineno}", name, *arguments))

    @staticmethod
    def is_use(name: str) -> bool:
        return name.startswith(PREFIXES)

    def dotted(self, node: ast.AST) -> str | None:
        """The dotted name that an expression stands for; None where it is something else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else None
        if isinstance(node, ast.Call):
            # the device's module: torch.get_device_module(device), or getattr(torch, device_name)
            function = self.dotted(node.func) or (node.func.id if isinstance(node.func, ast.Name) else None)
            if function == "torch.get_device_module":
                return "torch.npu"
            if function == "getattr" and self.dotted(node.args[0]) == "torch":
                constant = isinstance(node.args[1], ast.Constant)
                return f"torch.{node.args[1].value}" if constant else "torch.npu"
        return None
