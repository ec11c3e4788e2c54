"""The flags of every test/*.sh: parsed, checked, and printed as shell assignments for launch.sh.

Called by launch.sh alone. What the run is (its nodes, this one among them, its restarts) is printed as one JSON object,
LAUNCH_PLAN, which launch.sh hands on to run.py. Pure Python, no torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.launch.world import LaunchError, shell_assignments

SWITCHES = ("dry_run", "help", "profile", "deterministic", "dump_precision")
NUMBERS = (  # and the least that each may be
    ("batch_size", 0), ("epochs", 0), ("max_steps", 0), ("device_id", 0), ("nproc", 0), ("nnodes", 0), ("node_rank", 0),
    ("master_port", 1), ("devices_per_server", 1), ("max_restarts", 0), ("min_nodes", 1), ("collective_timeout", 1),
)  # fmt: skip
CHOICES = {"device": ("auto", "npu", "cuda", "cpu"), "precision": ("fp32", "bf16", "fp16"), "cpu_bind": ("auto", "off")}
# Flags whose value may be a path: one that exists is meant from where the user stands.
_IS_PATH = re.compile(r".*_(path|dir|file|weight)|hostfile|config|resume")
# Files joined by `::`, with braces or wildcards, a list as @FILE, URLs: all that is relative is meant likewise.
_IS_PATTERN = re.compile(r"(train|validation)_(file|shards)")
_ONLY_FOR_NODES = ("master_addr", "master_port", "node_rank")


@dataclass
class Flags:
    """What the user and the script say, by name; a flag without a value is empty."""

    values: dict[str, str]
    given: set[str] = field(default_factory=set)
    pass_through: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    def number(self, name: str) -> int | None:
        return int(self[name]) if self[name] else None


def parse(words: Sequence[str], values: Mapping[str, str], folder: Path) -> Flags:
    """The flags in `words`, over the script's own `values`; paths that exist below `folder` become absolute.

    Raises LaunchError for a word that is no flag, an unknown flag, and one without a value.
    """
    flags = Flags(dict(values))
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            flags.pass_through = rest
            break
        if not re.match("--.", word):
            raise LaunchError(f"unexpected argument {word!r}: write flags as --key=value or --key value")
        name, equals, value = word[2:].partition("=")
        if name not in values:
            nearest = difflib.get_close_matches(name, values, 1, 0.5)
            hint = f"; did you mean --{nearest[0]}?" if nearest else ""
            raise LaunchError(f"unknown flag --{name}{hint} (--help lists all; Python options go after a lone --)")
        if name in SWITCHES:
            if equals:
                raise LaunchError(f"{word}: --{name} takes no value")
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise LaunchError(f"--{name} needs a value")
            value = rest.pop(0)
        if _IS_PATTERN.fullmatch(name):
            value = "::".join(_absolute_pattern(part, folder) for part in value.split("::"))
        flags.values[name] = _absolute(value, folder) if _IS_PATH.fullmatch(name) else value
        flags.given.add(name)
    return flags


def _absolute(value: str, folder: Path) -> str:
    if value.startswith("~/"):  # a shell leaves it in --key=~/data
        value = os.path.expanduser(value)
    path = folder / value
    return os.path.realpath(path) if value and os.path.exists(path) else value  # a name too long does not


def _absolute_pattern(part: str, folder: Path) -> str:
    mark, path = ("@", part[1:]) if part.startswith("@") else ("", part)
    elsewhere = not path or "://" in path or path.startswith("pipe:")
    return part if elsewhere else mark + os.path.join(folder, os.path.expanduser(path))


def check(flags: Flags, environ: Mapping[str, str], unused: Sequence[str] = (), script: str = "") -> None:
    """Raises LaunchError for a flag taken from the environment, a value out of range, or a flag that does nothing."""
    for name in flags.values:
        if name in environ and name not in flags.given:
            raise LaunchError(
                f"the environment variable {name}={environ[name]} has the name of a flag: unset {name}, or give "
                f"--{name} on the command line"
            )
    for name in unused:
        if name in flags.given:
            raise LaunchError(f"--{name} does nothing in {script}: omit it")
    for name, least in NUMBERS:
        value = flags[name]
        if value and not re.fullmatch("0|[1-9][0-9]{0,17}", value):
            raise LaunchError(f"--{name}={value}: must be a whole number, such as 8")
        if value and int(value) < least:
            raise LaunchError(f"--{name}={value}: must be at least {least}")
    if (flags.number("master_port") or 0) > 65535:
        raise LaunchError(f"--master_port={flags['master_port']}: must be at most 65535")
    data, checkpoint = flags["data_path"], flags["ckpt_path"]
    if data and not os.path.exists(data):
        raise LaunchError(f"--data_path={data}: no such file or folder")
    # a bare word such as mae_vit_base_p16 is a published name, which Python looks up
    if re.search("[./]", checkpoint) and "://" not in checkpoint and not os.path.exists(checkpoint):
        raise LaunchError(f"--ckpt_path={checkpoint}: no such file or folder")
    for name, allowed in CHOICES.items():
        if flags[name] not in ("", *allowed):
            raise LaunchError(f"--{name}={flags[name]}: choose {', '.join(allowed[:-1])} or {allowed[-1]}")


def npu_is_meant(device: str) -> bool:
    """Whether the run is for Ascend cards: asked for, or there and nothing asked for."""
    return device == "npu" or (device == "auto" and os.path.exists("/dev/davinci_manager"))


def rank_table_of(flags: Flags, environ: Mapping[str, str], ranks: int, npu: bool) -> str:
    """The rank table of the run: the flag's, or on an npu RANK_TABLE_FILE's where several ranks are meant."""
    given, inherited = flags["rank_table_file"], environ.get("RANK_TABLE_FILE", "")
    if not (npu and inherited and (ranks > 1 or environ.get("RANK_ID"))):
        return given
    if given and os.path.realpath(given) != os.path.realpath(inherited):
        raise LaunchError(f"--rank_table_file={given}, but RANK_TABLE_FILE={inherited}: give one file")
    return os.path.realpath(inherited)


def plan_of(flags: Flags, environ: Mapping[str, str], ranks: int) -> dict:
    """What run.py needs to know of the run.

    Args:
        ranks: of a node, where nothing else says it.

    Raises LaunchError for flags that leave no clear world, or do not go together.
    """
    device = flags["device"] or "auto"
    npu = npu_is_meant(device)
    table = rank_table_of(flags, environ, ranks, npu)
    if table and flags["device_id"]:
        raise LaunchError(f"--device_id={flags['device_id']}: omit it: the rank table says which devices are used")
    options = argparse.Namespace(
        rank_table_file=table,
        hostfile=flags["hostfile"],
        master_addr=flags["master_addr"],
        default_nproc=ranks,
        dry_run=flags["dry_run"],
        **{name: flags.number(name) for name in ("devices_per_server", "nnodes", "node_rank", "nproc", "master_port")},
    )
    world = shell_assignments(options, environ)
    _check_elastic(flags, world)
    _check_together(flags, world, table)
    restarts = flags.number("max_restarts") or 0
    return {
        **world,
        "device": device,
        "npu_is_meant": npu,
        "rank_table_file": table,
        "card": _card(flags, environ, world, npu),
        "dry_run": flags["dry_run"] == "true",
        "max_restarts": restarts,
        "min_nodes": flags.number("min_nodes"),
        "collective_timeout": flags.number("collective_timeout"),
        "cpu_bind": flags["cpu_bind"] or "auto",
        "goes_on": flags["resume"] == "auto",
    }


def _check_elastic(flags: Flags, world: Mapping) -> None:
    restarts, least, nodes = flags["max_restarts"], flags["min_nodes"], int(world["nnodes"])
    if least and int(restarts or 0) < 1:
        raise LaunchError(f"--min_nodes={least} needs --max_restarts=N: how many losses to survive")
    if int(restarts or 0) and (int(world["world_size"]) == 1 or world["rank_variables"]):
        raise LaunchError("--max_restarts needs several ranks that this script starts")
    if least and int(least) > nodes:
        raise LaunchError(f"--min_nodes={least}: choose 1 to {nodes}")


def _check_together(flags: Flags, world: Mapping, table: str) -> None:
    if flags["devices_per_server"] and not table:
        raise LaunchError(f"--devices_per_server={flags['devices_per_server']} needs --rank_table_file")
    if flags["collective_timeout"] and world["world_size"] == "1":
        raise LaunchError(f"--collective_timeout={flags['collective_timeout']} needs several ranks: this run has one")
    if not (table or flags["hostfile"] or flags["nnodes"] or world["rank_variables"]):
        for name in _ONLY_FOR_NODES:
            if flags[name]:
                raise LaunchError(f"--{name}={flags[name]} needs --nnodes, --hostfile or --rank_table_file")


def _card(flags: Flags, environ: Mapping[str, str], world: Mapping, npu: bool) -> tuple[str, str] | None:
    """(card, who says so) where --device_id or ASCEND_DEVICE_ID mean the only card of the run; None without."""
    name, value = "--device_id", flags["device_id"]
    if not value:
        name, value = "ASCEND_DEVICE_ID", environ.get("ASCEND_DEVICE_ID", "")
        if value and not re.fullmatch("[0-9]{1,4}", value):
            raise LaunchError(f"ASCEND_DEVICE_ID={value}: must be a whole number, or unset")
    if not value:
        return None
    ranks = int(world["node_nproc"][int(world["node_rank"])])
    by_user = environ.get("DEVICE_ID") if world["rank_variables"] else None
    # 0 is every image's default, and without cards of that kind it is the name of the output folder
    names_a_folder = name == "ASCEND_DEVICE_ID" and (int(value) == 0 or (ranks > 1 and not npu))
    if by_user is not None:
        if int(by_user) != int(value) and not names_a_folder:
            raise LaunchError(f"{name}={value}, but DEVICE_ID={by_user}: set only one of them")
        return None
    if names_a_folder:
        return None
    if ranks > 1:
        raise LaunchError(
            f"{name}={value} names one card, but this node has {ranks} ranks: choose cards with "
            "ASCEND_RT_VISIBLE_DEVICES (npu) or CUDA_VISIBLE_DEVICES"
        )
    return str(int(value)), f"{name}={value}"


def usage(script: Path, names: Sequence[str]) -> str:
    """The comment at the head of a script, and all its flags."""
    lines = script.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(re.sub("^# ?", "", line))
    flags = " ".join(f"--{name}=" for name in names if name not in SWITCHES)
    return "\n".join(
        [
            *head,
            f"Flags: {flags} {' '.join('--' + name for name in SWITCHES)}; after a lone --, arguments for Python",
        ]
    )


def assignments(flags: Flags, plan: Mapping) -> dict[str, str | list[str]]:
    """Shell variables: every flag, what of the world a script may use, the arguments after --, and the plan."""
    known = {name: plan[name] for name in ("nnodes", "node_rank", "master_addr", "master_port", "world_size")}
    known |= {"nproc": plan["node_nproc"][int(plan["node_rank"])], "npu_is_meant": str(plan["npu_is_meant"]).lower()}
    known |= {"device": plan["device"], "rank_table_file": plan["rank_table_file"], "cpu_bind": plan["cpu_bind"]}
    return {**flags.values, **known, "pass_through": flags.pass_through, "LAUNCH_PLAN": json.dumps(plan)}


def main(argv: Sequence[str]) -> None:
    """argv: folder of the user, script, ranks, unused flags, count, NAME=VALUE of each flag, the words."""
    folder, script, ranks, unused, count, *words = argv
    os.chdir(folder)
    values = dict(word.split("=", 1) for word in words[: int(count)])
    try:
        flags = parse(words[int(count) :], values, Path(folder))
        if flags["help"]:
            found: Mapping = {"usage": usage(Path(script), list(values))}
        else:
            check(flags, os.environ, unused.split(), Path(script).name)
            for name in ("output_dir", "log_dir"):  # which need not be there yet
                if flags.values.get(name):
                    flags.values[name] = os.path.abspath(os.path.expanduser(flags[name]))
            plan = plan_of(flags, os.environ, int(ranks))
            if not plan["dry_run"] and importlib.util.find_spec("psutil") is None:
                raise LaunchError(
                    f"{sys.executable} has no psutil: activate the environment with the requirements first"
                )
            if plan["max_restarts"] and flags.values.get("resume") == "" and not flags["ckpt_path"]:
                flags.values["resume"] = "auto"
                print("note: --max_restarts means --resume=auto: from the newest checkpoint in the output folder, "
                      "if there is one", file=sys.stderr)  # fmt: skip
            found = assignments(flags, plan)
    except LaunchError as error:
        raise SystemExit("\n".join(f"error: {line}" for line in str(error).splitlines())) from None
    for name, value in found.items():
        text = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        sys.stdout.buffer.write(os.fsencode(f"{name}={text}\n"))  # names of files are bytes, in any encoding


if __name__ == "__main__":
    main(sys.argv[1:])
