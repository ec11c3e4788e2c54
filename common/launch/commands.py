"""What starts the ranks of a node: the command line (torchrun's, for several ranks) and the environment it needs.

python -m common.launch.commands    prints it for every node, for launch.sh --dry_run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.launch.world import LaunchError
from common.rank_table.servers import ip_address, is_loopback

_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_LOGIN = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


@dataclass
class NodeCommand:
    """One node's command, the variables that it sets and those that it must not inherit."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in environ.items() if name not in self.unset}
        return kept | self.variables

    def __str__(self) -> str:
        """As one would type it, without what is secret."""
        changes = [word for name in self.unset for word in ("-u", name)]
        changes += [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join(quoted(word) for word in redacted([*(["env", *changes] if changes else []), *self.words]))


def node_command(plan: Mapping[str, Any], node: int, command: Sequence[str], settings: Mapping[str, str], python: str):
    """The NodeCommand that starts `command` on every rank of node `node` of `plan` (`flags.plan_of`).

    Args:
        settings: of the run, that make its meeting its own: network and output folder.
        python: the interpreter of torchrun.
    """
    result = NodeCommand(list(command))
    devices = ",".join(map(str, sorted(int(number) for number in plan["node_devices"][node].split(",") if number)))
    if devices:
        _show(plan, devices, f"the rank table has devices {devices}", result)
    if plan["card"]:
        devices, who = plan["card"]
        _show(plan, devices, who, result)
    several = int(plan["world_size"]) > 1 and not plan["rank_variables"]
    elastic = several and plan["max_restarts"] > 0 and int(plan["nnodes"]) > 1
    if elastic:
        # ranks are dealt out at each meeting, the table's do not hold: HCCL goes without
        result.unset = ("RANK_TABLE_FILE",)
    elif plan["rank_table_file"] and plan["npu_is_meant"]:
        result.variables["RANK_TABLE_FILE"] = plan["rank_table_file"]
    result.variables |= dict(text.split("=", 1) for text in plan["rank_variables"])
    if several:
        meeting = _meeting(plan, node, settings) if int(plan["nnodes"]) > 1 else ["--standalone"]
        if plan["max_restarts"]:
            meeting += ["--max_restarts", str(plan["max_restarts"])]
            # else a restart meets in the failed attempt's store, with its dead ranks' addresses (pytorch issue 167288)
            result.variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        ranks = ["--nproc_per_node", plan["node_nproc"][node], "--no_python"]
        result.words = [python, "-m", "torch.distributed.run", *meeting, *ranks, *command]
    return result


def _meeting(plan: Mapping[str, Any], node: int, settings: Mapping[str, str]) -> list[str]:
    """torchrun's options by which several nodes find each other."""
    nodes, address, port = plan["nnodes"], plan["master_addr"], plan["master_port"]
    if not plan["max_restarts"]:
        return ["--nnodes", nodes, "--node_rank", str(node), "--master_addr", address, "--master_port", port]
    words = ["--nnodes", f"{plan['min_nodes'] or nodes}:{nodes}", "--rdzv_backend", "c10d"]
    words += ["--rdzv_endpoint", f"{address}:{port}", "--rdzv_id", run_id(plan, settings)]
    words += ["--rdzv_conf", f"is_host={int(node == 0)}"]
    own = plan["node_addresses"][node] or (plan["own_address"] if str(node) == plan["node_rank"] else "")
    return [*words, "--local_addr", own] if own else words


def card_indices(plan: Mapping[str, Any]) -> list[int]:
    """By local rank, the index of its card among this node's visible ones; empty when they are in one order.

    A rank table may number the ranks of a server along a ring (0, 1, 3, 2), while ASCEND_RT_VISIBLE_DEVICES takes
    ascending numbers only (CANN's reference of environment variables).
    """
    devices = [int(number) for number in plan["node_devices"][int(plan["node_rank"])].split(",") if number]
    indices = [sorted(devices).index(number) for number in devices]
    return [] if indices == sorted(indices) or plan["device"] == "cpu" else indices


def run_id(plan: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """The rendezvous' name: the same on all nodes of a run, another for each run, also of one network on one port."""
    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "VC_JOB_NAME", "PBS_JOBID", "LSB_JOBID")]
    folder = "/".join(settings["output_dir"].split("/")[-2:])  # what is above it may be mounted elsewhere on each node
    parts = [plan["master_addr"], plan["master_port"], *job, settings["network"], settings["case_kind"], folder]
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{settings['network']}-{digest[:12]}"


def _show(plan: Mapping[str, Any], devices: str, who: str, result: NodeCommand) -> None:
    """Leaves only the cards `devices` visible to the run: in ascending order, CANN knows no other.

    Raises LaunchError where the user's variable says otherwise.
    """
    for kind, name in _VISIBLE.items():
        if plan["device"] not in (kind, "auto"):
            continue
        visible = os.environ.get(name, "")
        # one card of several that are visible is a choice among them
        if visible and visible != devices and devices not in visible.split(","):
            raise LaunchError(f"{who}, but {name}={visible}: set only one of them")
        result.variables[name] = devices


def common_environment(plan: Mapping[str, Any], cores: int) -> dict[str, str]:
    """Variables of every rank of this node that the user has not set, some said aloud."""
    found: dict[str, str] = {}
    if plan["collective_timeout"]:
        found["COLLECTIVE_TIMEOUT_S"] = str(plan["collective_timeout"])
        found["HCCL_EXEC_TIMEOUT"] = os.environ.get("HCCL_EXEC_TIMEOUT") or str(plan["collective_timeout"])
    interface = plan["node_interface"]
    if interface and not os.environ.get("GLOO_SOCKET_IFNAME"):  # gloo would go by the host name, often 127.0.1.1
        found["GLOO_SOCKET_IFNAME"] = interface
        where = plan["node_addresses"][int(plan["node_rank"])] or f"the way to {plan['master_addr']}"
        print(f"GLOO_SOCKET_IFNAME={interface}, the interface of {where}", flush=True)
    if plan["npu_is_meant"] and not {"HCCL_IF_IP", "HCCL_SOCKET_IFNAME"} & set(os.environ):
        found |= _hccl_network(plan)
    ranks = int(plan["node_nproc"][int(plan["node_rank"])])
    if ranks > 1 and not os.environ.get("OMP_NUM_THREADS"):
        found["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    return found


def _hccl_network(plan: Mapping[str, Any]) -> dict[str, str]:
    """How HCCL's hosts meet: over the address that rank table or host file give this node, else its interface.

    Left to itself HCCL takes the first network of the host, which on a server with several may lead nowhere.
    """
    address, interface = plan["node_addresses"][int(plan["node_rank"])], plan["node_interface"]
    if address and ip_address(address) is not None and not is_loopback(address):
        found = {"HCCL_IF_IP": address}
    else:
        found = {"HCCL_SOCKET_IFNAME": f"={interface}"} if interface else {}  # "=": this one, not all that begin so
    for name, value in found.items():
        print(f"{name}={value}, this node's place in the run", flush=True)
    return found


def redacted(words: Sequence[str]) -> list[str]:
    """`words` for a log: values of flags such as --token and --hub_token, and logins in URLs, are left out."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            word = "***"
        elif is_secret(name):
            word = f"{name}=***" if equals else word
        hide = is_secret(name) and not equals
        shown.append(_LOGIN.sub("***", word))
    return shown


def is_secret(name: str) -> bool:
    """Whether an option of this name holds what no log may show (a tokenizer is no token)."""
    parts = re.split(r"[^a-z0-9]+|_", name.lower())
    return bool({"token", "secret", "password", "passwd", "apikey", "credential", "credentials"} & set(parts)) or (
        "api" in parts and "key" in parts
    )


def quoted(word: str) -> str:
    """`word` as bash's printf %q writes it."""
    if re.search(r"[\x00-\x1f\x7f]", word):
        return "'" + word.replace("'", "'\\''") + "'"
    return re.sub(r"([^\w@%+=:./-])", r"\\\1", word) or "''"


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What makes the meeting of a run its own."""
    return {"network": options.network, "case_kind": options.case_kind, "output_dir": options.output_dir}


def task_of_launcher(description: str) -> tuple[argparse.Namespace, dict[str, Any], dict[str, list[str]]]:
    """What launch.sh hands over: its options, the plan (`flags.plan_of`), and the command and on_restart as words."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("network", "case_kind", "batch_size", "project_dir", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    plan = json.loads(os.environ.pop("LAUNCH_PLAN"))
    words = {name: os.environ.pop(f"LAUNCH_{name.upper()}").split("\x1f")[:-1] for name in ("command", "on_restart")}
    return options, plan, words


def main() -> None:
    """Prints what would run on every node; of a rank that the user starts himself, that one."""
    options, plan, words = task_of_launcher(main.__doc__ or "")
    for node, address in enumerate(plan["node_addresses"]):
        if plan["rank_variables"] and node != int(plan["node_rank"]):
            continue
        if int(plan["nnodes"]) > 1:
            print(f"# node {node}" + (f", {address}" if address else ""))
        try:
            line = node_command(plan, node, words["command"], settings(options), "python3")
        except LaunchError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"cd {quoted(options.project_dir)} && {line} ")


if __name__ == "__main__":
    main()
