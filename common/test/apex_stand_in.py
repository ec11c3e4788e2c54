"""A stand-in of apex.amp's documented interface (https://nvidia.github.io/apex/amp.html), on a CPU and without casts.

It scales the loss, unscales after the backward pass and skips the step that follows an overflow.
"""

FRONTEND = """
import contextlib, torch
calls, scale, skip = [], 65536.0, False

def initialize(models, optimizers=None, opt_level="O1", loss_scale=None, verbosity=1):
    global scale
    calls.append((opt_level, loss_scale))
    scale = 65536.0 if loss_scale == "dynamic" else loss_scale
    step = optimizers.step
    def skipping():
        global skip
        if not skip:
            step()
        skip = False
    optimizers.step = skipping
    return models, optimizers

@contextlib.contextmanager
def scale_loss(loss, optimizers):
    global skip
    yield loss * scale
    for group in optimizers.param_groups:
        for parameter in group["params"]:
            parameter.grad /= scale
            skip |= not bool(parameter.grad.isfinite().all())

def state_dict():
    return {"loss_scaler0": {"loss_scale": scale, "unskipped": 0}}

def load_state_dict(state):
    global scale
    scale = state["loss_scaler0"]["loss_scale"]
"""

# path in the package -> content
PACKAGE = {"__init__.py": "", "amp/__init__.py": "from .frontend import *", "amp/frontend.py": FRONTEND}
