"""From a pretraining checkpoint to a fine-tuning model (reference `run_class_finetuning.py`, "--finetune")."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit2.model.vision_transformer import VisionTransformer

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def convert_pretrained(state_dict: dict[str, Tensor], classifier: VisionTransformer) -> dict[str, Tensor]:
    """Weights of a pretraining model in the shape and under the names of `classifier`.

    The shared relative position table is copied to every block, index buffers are dropped, tables and absolute
    positions are resized to the classifier's window, a head of another size is dropped. What the classifier has no
    place for (mask_token, lm_head, cls_pt_layers, norm) stays in: load with strict=False.

    Raises:
        ValueError: tables of a window that is not square, or too small for a cubic spline, and differs from the
            classifier's.
    """
    state, own = dict(state_dict), classifier.state_dict()
    if classifier.use_rel_pos_bias and SHARED_TABLE in state:
        table = state.pop(SHARED_TABLE)
        for number in range(len(classifier.blocks)):
            state[f"blocks.{number}.attn.relative_position_bias_table"] = table.clone()
    for name in [n for n in state if n.endswith("relative_position_index")]:
        del state[name]
    for name, tensor in state.items():
        if name.endswith("relative_position_bias_table") and name in own and tensor.shape != own[name].shape:
            state[name] = resize_bias_table(tensor, classifier.window_size)
    if "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = resize_positions(state["pos_embed"], classifier.window_size)
    for name in ("head.weight", "head.bias"):
        if name in state and (name not in own or state[name].shape != own[name].shape):
            del state[name]
    return state


def resize_positions(positions: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Absolute positions [1, 1 + n * n, C] -> [1, 1 + h * w, C]; bicubic, CLS unchanged."""
    cls, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=window_size, mode="bicubic", align_corners=False)
    return torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1)


def resize_bias_table(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Relative position table [(2n-1)^2 + 3, H] -> [(2m-1)^2 + 3, H]; its last three rows are kept.

    The old positions are spread as a geometric progression that reaches as far as the new ones, so that the table
    stays dense around zero; the new values are the cubic spline through the old ones there.
    """
    extra = 3
    source = round((table.shape[0] - extra) ** 0.5)
    target = 2 * window_size[0] - 1
    if source * source != table.shape[0] - extra or window_size[0] != window_size[1]:
        raise ValueError(f"relative position table of {table.shape[0]} rows to window {window_size}: only square ones")
    if source < 4:
        raise ValueError(f"relative position table of a {(source + 1) // 2} x {(source + 1) // 2} window: too small")
    positions = _geometric_positions(source, target)
    wanted = np.arange(-(target // 2), target // 2 + 0.1, 1.0)
    basis = spline_matrix(positions, wanted)  # [target, source]
    values = table[:-extra].double().cpu().numpy().reshape(source, source, -1)
    resized = np.einsum("ia,jb,abh->ijh", basis, basis, values).reshape(target * target, -1)
    return torch.cat((torch.from_numpy(resized).to(table), table[-extra:]), dim=0)


def _geometric_positions(source: int, target: int) -> np.ndarray:
    """`source` positions symmetric about 0 with steps 1, q, q^2, ... whose last is about target // 2."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2.0
        reach = (1.0 - ratio ** (source // 2)) / (1.0 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    positive = np.cumsum(ratio ** np.arange(source // 2))
    return np.concatenate((-positive[::-1], [0.0], positive))


def spline_matrix(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The matrix that maps values at x [n >= 4, ascending] to the interpolating cubic spline's values at `wanted`.

    Not-a-knot ends, and beyond the ends the end's value: FITPACK's interpolating spline, i.e. what the reference got
    from `scipy.interpolate.interp2d(kind="cubic")`, which current SciPy no longer has.
    """
    knots = np.concatenate((np.repeat(x[0], 4), x[2:-2], np.repeat(x[-1], 4)))
    clamped = np.clip(wanted, x[0], x[-1])
    return _bspline_basis(knots, clamped) @ np.linalg.inv(_bspline_basis(knots, x))


def _bspline_basis(knots: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Cubic B-splines by the Cox-de Boor recursion: [len(points), len(knots) - 4]."""
    inside = np.minimum(points, np.nextafter(knots[-1], -np.inf))[:, None]  # the last interval is closed
    basis = ((knots[:-1] <= inside) & (inside < knots[1:])).astype(np.float64)
    points = points[:, None]
    for degree in range(1, 4):
        count = len(knots) - degree - 1
        left, right = knots[:count], knots[degree + 1 : degree + 1 + count]
        left_width, right_width = knots[degree : degree + count] - left, right - knots[1 : 1 + count]
        with np.errstate(divide="ignore", invalid="ignore"):
            rising = np.where(left_width > 0, (points - left) / left_width, 0.0)
            falling = np.where(right_width > 0, (right - points) / right_width, 0.0)
        basis = rising * basis[:, :count] + falling * basis[:, 1 : count + 1]
    return basis
