"""`torch.npu`: the functions that torch, accelerate and this repository call, with torch_npu 2.13's signatures."""

from __future__ import annotations

import contextlib
import types
from types import ModuleType

import torch


class Config:
    """`torch.npu.config`: options that can be set and, as in torch_npu, not read back."""

    KNOWN = ("allow_internal_format",)

    def __setattr__(self, name: str, value: bool) -> None:
        if name not in self.KNOWN:
            raise AttributeError(f"torch.npu.config has no option {name}")
        if not isinstance(value, bool):
            raise TypeError(f"torch.npu.config.{name} must be a bool, not {value!r}")


class Conv:
    """`torch.npu.conv`: whether fp32 convolutions multiply in HF32, which they do unless told otherwise."""

    def __init__(self, native: ModuleType):
        object.__setattr__(self, "_native", native)

    def __setattr__(self, name: str, value: bool) -> None:
        if name != "allow_hf32":
            return  # torch_npu passes over it without a word
        if not isinstance(value, bool):
            raise TypeError(f"allow_hf32 must be a bool, but got {type(value).__name__}")
        self._native.allow_conv_hf32(value)

    def __getattr__(self, name: str) -> bool | None:
        return self._native.conv_hf32() if name == "allow_hf32" else None


class Event(torch.Event):
    def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
        return torch.Event.__new__(
            cls, device="npu", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )


def make(native: ModuleType) -> ModuleType:
    """The module over the compiled device."""
    module = ModuleType("torch.npu")

    def index(device=None) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return native.current_device() if found is None else found

    _add_devices(module, native, index)
    _add_random(module, native, index)
    _add_memory(module, native, index)
    _add_streams(module, native, index)
    module.config = Config()
    module.conv = Conv(native)
    module.set_compile_mode = lambda jit_compile=False: None
    module.amp = types.SimpleNamespace(
        autocast=lambda *args, **kwargs: torch.amp.autocast("npu", *args, **kwargs),
        GradScaler=lambda *args, **kwargs: torch.amp.GradScaler("npu", *args, **kwargs),
    )
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    module.is_bf16_supported = lambda including_emulation=False: not native.first_generation()
    module.npu = module
    return module


def _add_devices(module, native, index) -> None:
    class device(contextlib.ContextDecorator):  # noqa: N801 - torch's name
        def __init__(self, device):
            self.index = -1 if device is None else index(device)

        def __enter__(self):
            self.before = native.exchange_device(self.index)

        def __exit__(self, *_):
            native.set_device(self.before)

    class device_of(device):  # noqa: N801 - torch's name
        def __init__(self, tensor):
            super().__init__(tensor.device if tensor.device.type == "npu" else None)

    module.device, module.device_of = device, device_of
    module.is_available = lambda: native.device_count() > 0
    module.device_count = native.device_count
    module.current_device = native.current_device
    module.set_device = lambda device: native.set_device(index(device))
    module.get_device_name = lambda device=None: f"{native.card()} (simulated, host memory)"
    module.get_npu_overflow_flag = native.overflow_flag
    module.clear_npu_overflow_flag = native.clear_overflow_flag
    module.is_initialized = lambda: True
    module.init = module._lazy_init = lambda: None
    module._is_in_bad_fork = native.in_bad_fork
    module._exchange_device = module._maybe_exchange_device = native.exchange_device


def _add_random(module, native, index) -> None:
    def generator(device=None):
        return native.default_generator(index(device))

    def generators():
        return [native.default_generator(i) for i in range(native.device_count())]

    def manual_seed_all(seed):
        for each in generators():
            each.manual_seed(int(seed))

    def set_rng_state_all(states):
        for each, state in zip(generators(), states, strict=True):
            each.set_state(state)

    random = types.SimpleNamespace(
        manual_seed=lambda seed: generator().manual_seed(int(seed)) and None,
        manual_seed_all=manual_seed_all,
        initial_seed=lambda: generator().initial_seed(),
        get_rng_state=lambda device="npu": generator(device).get_state(),
        set_rng_state=lambda state, device="npu": generator(device).set_state(state) and None,
        get_rng_state_all=lambda: [each.get_state() for each in generators()],
        set_rng_state_all=set_rng_state_all,
    )
    module.random = random
    for name, function in vars(random).items():
        setattr(module, name, function)


def _add_memory(module, native, index) -> None:
    def allocated(device=None):
        return native.allocated_bytes(index(device))

    def peak(device=None):
        return native.peak_bytes(index(device))

    module.memory_allocated = module.memory_reserved = allocated
    module.max_memory_allocated = module.max_memory_reserved = peak
    module.reset_peak_memory_stats = lambda device=None: native.reset_peak(index(device))
    module.empty_cache = lambda: None
    module.mem_get_info = lambda device=None: (native.total_bytes() - allocated(device), native.total_bytes())


def _add_streams(module, native, index) -> None:
    def as_device(device=None) -> torch.device:
        return torch.device("npu", index(device))

    def synchronize(device=None) -> None:
        native.note("host_wait", "torch.npu.synchronize")

    @contextlib.contextmanager
    def stream(chosen):
        if chosen is None:
            yield
            return
        before = module.current_stream(chosen.device)
        module.set_stream(chosen)
        try:
            yield chosen
        finally:
            module.set_stream(before)

    module.Event = Event
    module.Stream = lambda device=None, priority=0, **_: torch.Stream(device=as_device(device))
    module.synchronize = synchronize
    module.stream = stream
    module.set_stream = lambda chosen: torch.accelerator.set_stream(chosen)
    module.current_stream = lambda device=None: torch.accelerator.current_stream(as_device(device))
    module.default_stream = lambda device=None: torch.Stream(stream_id=0, device_index=index(device), device_type=20)
