"""Prints, or runs over ssh, the command of every node of a rank table or host file.

    python -m common.launch.cluster --rank_table_file=hccl_2s_16p.json bash X_for_PyTorch/test/train_cluster.sh FLAGS
    python -m common.launch.cluster --hostfile=hosts --run bash X_for_PyTorch/test/train_cluster.sh FLAGS -- ...

The script is any of test/*.sh; each node gets it with --node_rank and the table or host file. The repository and all
files named must be at the same paths on every node, and ssh must need no password. With --run there is one log a node,
the first node that fails ends the others, and its exit code is returned. Where a scheduler starts the nodes, see
common/launch/ instead.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import PREEMPTED
from common.launch.world import LaunchError, Node, add_arguments, nodes_of_hostfile, nodes_of_table

# A host that is lost ends its session after a minute; nothing is ever asked on a terminal.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15")
SSH_FAILED = 255  # ssh's own exit code
END_TIMEOUT_S = 150  # the launcher gives ranks that were asked to stop 100 s for a checkpoint
# Runs on a node: the command ends when it is done, or when the connection closes, for whatever reason.
_WATCHED = """\
exec 3<&0 </dev/null
{preparation}
{command} 3<&- &
run=$!
{{ while read -r -u 3 _; do :; done; kill -TERM $run; }} 2>/dev/null &
watch=$!
exec 3<&-
wait $run
code=$?
kill $watch 2>/dev/null
exit $code"""


@dataclass
class Session:
    """The ssh process of one node, whose output a thread writes to `log`."""

    index: int
    node: Node
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, command: list[str], ended: queue.SimpleQueue[tuple[int, int]]) -> None:
        """Start `command`; (index, exit code) is put into `ended` when it has ended."""
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C is for us, who then end the nodes in order
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # they are pipes
        self._input, self._output = self.process.stdin, self.process.stdout
        threading.Thread(target=self._read, args=(ended,), daemon=True).start()

    def end(self) -> None:
        """Close the node's input, which ends the command there."""
        with contextlib.suppress(OSError):
            self._input.close()

    def _read(self, ended: queue.SimpleQueue[tuple[int, int]]) -> None:
        with self.log.open("ab") as log:
            log.write(f"==== {datetime.datetime.now():%F %T} node {self.index}, {self.node.address}\n".encode())
            for line in self._output:
                log.write(line)
                log.flush()
                if self.index == 0:
                    print(line.decode(errors="replace"), end="", flush=True)
        ended.put((self.index, self.process.wait()))


def node_command(script: Sequence[str], node_rank: int, flags: Sequence[str]) -> str:
    """The shell line that starts `script` as node `node_rank`; `flags` name the nodes."""
    words = list(script)
    place = words.index("--") if "--" in words else len(words)  # what follows is for the Python script
    return shlex.join([*words[:place], *flags, f"--node_rank={node_rank}", *words[place:]])


def run_everywhere(
    nodes: Sequence[Node], commands: Sequence[str], preparation: str, ssh: Sequence[str], log_dir: Path
) -> int:
    """Run `commands[i]` on `nodes[i]` and wait; the exit code of the node that failed first, 0 when none did.

    `preparation` is shell text that each node runs before its command. Every node is ended when one fails, and on every
    way out of this function.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    sessions: list[Session] = []
    codes: dict[int, int] = {}
    try:
        for index, (node, command) in enumerate(zip(nodes, commands, strict=True)):
            watched = _WATCHED.format(preparation=preparation, command=command)
            session = Session(index, node, log_dir / f"node_{index}_{node.address}.log")
            session.start([*ssh, node.address, f"bash -c {shlex.quote(watched)}"], ended)
            sessions.append(session)
        while len(codes) < len(sessions) and not any(codes.values()):
            index, code = ended.get()
            codes[index] = code
    finally:
        _end(sessions, codes, ended)
    for session in sessions:
        print(f"node {session.index}  {session.node.address}  exit code {codes[session.index]}  {session.log}")
    if all(code == PREEMPTED for code in codes.values()):
        print(f"stopped with a checkpoint on every node: start it again to go on (exit code {PREEMPTED})")
        return PREEMPTED
    failed = next((index for index, code in codes.items() if code not in (0, PREEMPTED)), None)
    if failed is None:
        return 0
    _show_failure(sessions[failed], codes[failed])
    return codes[failed]


def _end(sessions: Sequence[Session], codes: dict[int, int], ended: queue.SimpleQueue[tuple[int, int]]) -> None:
    """End what still runs, by force after a time; `codes` is completed in order of ending."""
    for session in sessions:
        session.end()
    deadline = time.monotonic() + END_TIMEOUT_S
    while len(codes) < len(sessions):
        try:
            index, code = ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            stuck = [session for session in sessions if session.index not in codes]
            for session in stuck:
                print(f"error: node {session.index} did not end in {END_TIMEOUT_S} s: look there", file=sys.stderr)
                session.process.kill()
                codes[session.index] = session.process.wait()
            return
        codes[index] = code


def _show_failure(session: Session, code: int) -> None:
    name = f"node {session.index} ({session.node.address})"
    if code == SSH_FAILED:
        print(f"error: {name}: ssh could not connect, or the connection was lost", file=sys.stderr)
    print(f"error: {name} failed first, with exit code {code}; last lines of {session.log}:", file=sys.stderr)
    for line in session.log.read_text(errors="replace").splitlines()[-15:]:
        print(f"  | {line}", file=sys.stderr)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="common.launch.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--run", action="store_true", help="run the commands over ssh; without it they are printed")
    parser.add_argument("--folder", default=str(Path.cwd()), help="where the script starts; default: this folder")
    parser.add_argument(
        "--before", default=":", metavar="COMMAND", help="first on each node: 'source .venv/bin/activate'"
    )
    parser.add_argument("--log_dir", default="cluster_logs", help="with --run, one log a node; default: %(default)s")
    parser.add_argument("--ssh_options", default="", metavar="OPTIONS", help="e.g. '-p 2222 -l user'")
    parser.add_argument(
        "script", nargs=argparse.REMAINDER, help="bash X_for_PyTorch/test/train_cluster.sh --data_path=..."
    )
    options = parser.parse_args(argv)
    if not any(word.endswith(".sh") for word in options.script[:2]):
        parser.error("give the script after the options: bash X_for_PyTorch/test/train_cluster.sh ...")
    if bool(options.rank_table_file) == bool(options.hostfile):
        parser.error("give one of --rank_table_file and --hostfile")
    try:
        if options.rank_table_file:
            nodes = nodes_of_table(options.rank_table_file, options.nproc, options.devices_per_server)
        else:
            nodes = nodes_of_hostfile(options.hostfile, options.nproc, default_nproc=1)
    except LaunchError as error:
        parser.error(str(error))

    flags = []
    for name in ("rank_table_file", "hostfile"):
        if value := getattr(options, name):
            flags.append(f"--{name}={Path(value).resolve()}")
    for name in ("nproc", "devices_per_server", "master_addr", "master_port"):
        if value := getattr(options, name):
            flags.append(f"--{name}={value}")
    commands = [node_command(options.script, node_rank, flags) for node_rank in range(len(nodes))]
    ssh_options = shlex.split(options.ssh_options)
    preparation = f"cd {shlex.quote(options.folder)} && {{ {options.before}; }} || exit 2"
    if options.run:
        if shutil.which(SSH[0]) is None:
            parser.error("--run needs ssh, which is not installed; without --run the commands are printed")
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        raise SystemExit(run_everywhere(nodes, commands, preparation, [*SSH, *ssh_options], Path(options.log_dir)))
    for node_rank, (node, command) in enumerate(zip(nodes, commands, strict=True)):
        print(f"# node {node_rank}, {node.address}")
        print(shlex.join(["ssh", *ssh_options, node.address, f"{preparation}; {command}"]))


if __name__ == "__main__":
    main()
