"""Not torch_npu: a stand-in of its name for tests, whose `npu` device is host memory (see ci/npu/fake/README.md).

With this folder's parent on PYTHONPATH, `import torch` loads it as it loads the real one: by its entry point in the
group `torch.backends`. So the programs under test need no change, and neither do the processes that they start.
"""

from __future__ import annotations

import sys

__version__ = "2.13.0"
SIMULATED = True


def _autoload() -> None:
    """Called by torch at the end of `import torch`."""
    import torch
    from torch.distributed import distributed_c10d  # noqa: F401 - registers the types that the extension uses

    torch.utils.rename_privateuse1_backend("npu")
    from torch_npu import build, npu_module, operators, watch

    native = build.load()
    module = npu_module.make(native)
    torch._register_device_module("npu", module)
    sys.modules["torch.npu"] = module
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    _register_hccl(native)
    operators.register()
    watch.start(native)
    globals().update(
        npu=module, **{name: getattr(torch.ops.npu, name).default for name in operators.NAMES if name.startswith("npu")}
    )


def _register_hccl(native) -> None:
    from torch import distributed as dist

    def create(options, _):
        gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        return native.hccl(gloo)

    dist.Backend.register_backend("hccl", create, extended_api=True, devices=["npu"])
    dist.Backend.default_device_backend_map["npu"] = "hccl"
