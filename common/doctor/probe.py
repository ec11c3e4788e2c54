"""What `python -m common.doctor` lets run in processes of their own, because each may fail to import torch or crash.

    python -m common.doctor.probe product --device npu       a 2x2 matrix product on the device
    python -m common.doctor.probe all_reduce --device npu    one rank of an all-reduce; torchrun's variables say which

Prints one JSON line when it went well.
"""

from __future__ import annotations

import argparse
import json

import torch

from common import device as devices
from common import distributed
from common.errors import print_usage_errors


def product(device_name: str) -> dict:
    """Multiplies two 2x2 matrices on the device and compares with the known result."""
    device = devices.resolve(device_name)
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)  # [2, 2]
    result = (left @ left).cpu().tolist()
    if result != [[7.0, 10.0], [15.0, 22.0]]:
        raise ArithmeticError(f"2x2 product on {device} is {result}, not [[7, 10], [15, 22]]")
    count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
    return {"device": device.type, "name": devices.describe(device), "count": count}


def all_reduce(device_name: str) -> dict:
    """Sums 1, 2, ... over the ranks on their devices."""
    with distributed.process_group(device_name, init_timeout_s=120, train_timeout_s=120) as world:
        total = distributed.all_reduce_sum(torch.tensor([world.rank + 1.0], device=world.device)).item()
        expected = world.size * (world.size + 1) / 2
        if total != expected:
            raise ArithmeticError(f"the all-reduce over {world.size} ranks gave {total}, not {expected}")
        return {"device": world.device.type, "ranks": world.size}


@print_usage_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=("product", "all_reduce"))
    parser.add_argument("--device", choices=devices.DEVICES, default="auto")
    options = parser.parse_args()
    test = {"product": product, "all_reduce": all_reduce}[options.test]
    print(json.dumps(test(options.device)), flush=True)


if __name__ == "__main__":
    main()
