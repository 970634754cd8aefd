"""A SLURM cluster of two nodes on this machine, of Debian's ``slurm-wlm``, in namespaces of its own.

The controller and each node have their own host name, network and processes; the whole is one process namespace. When
its first process ends, and that ends with the test, the kernel ends every other one, and its networks go with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("node1", "node2")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=control
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
SchedulerParameters=bf_interval=1,sched_interval=1
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
NodeName=node[1-2] CPUs=64 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES State=UP
"""
"""Nodes claim what the batch script asks for by default (``config_overrides``: more cores than there are), and one GPU,
which is /dev/null. Requeued jobs are eligible after ``cred_expire`` seconds, a silent node counts as lost after
``SlurmdTimeout``; SLURM's own values are 120 and 300."""

CONTROLLER = """
set -e
mount --make-rprivate /
mount --bind hosts /etc/hosts
hostname control
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
exec slurmctld -D
"""

NODE = """
hostname $1
ip link set lo up
until ip link set eth0 up 2> /dev/null; do sleep 0.05; done
ip addr add 10.77.0.1${1#node}/24 dev eth0
while sleep 3600; do :; done
"""
NAMESPACES = ("--fork", "--kill-child", "--pid", "--mount-proc", "--uts", "--net")


class NoCluster(Exception):
    """This machine has no SLURM, or cannot start one."""


class Cluster:
    """A context; ``run`` runs a command of SLURM's in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.controller, self.nodes = folder, 0, {}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        for tool in ("slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "setpriv", "ip"):
            if not shutil.which(tool):
                raise NoCluster(f"no {tool}: apt-get install -y --no-install-recommends slurm-wlm")
        (self.folder / "state").mkdir(parents=True)
        files = {"slurm.conf": CONFIGURATION.format(folder=self.folder), "gres.conf": "Name=gpu File=/dev/null\n",
                 "cgroup.conf": "CgroupPlugin=cgroup/v1\n", "controller.sh": CONTROLLER, "node.sh": NODE,
                 "hosts": "127.0.0.1 localhost\n10.77.0.1 control\n10.77.0.11 node1\n10.77.0.12 node2\n"}  # fmt: skip
        for name, text in files.items():
            (self.folder / name).write_text(text)
        try:
            # The signal: no cluster outlives the tests, whatever ends them.
            self._start(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", *NAMESPACES, "bash", "controller.sh"])
            self.controller = self._child(self._started[0].pid)
            for number, name in enumerate(NODES, start=1):
                node = self._start([*self._inside(self.controller), "unshare", *NAMESPACES, "bash", "node.sh", name])
                self.nodes[name] = inner = self._child(self._child(node.pid))
                for line in (f"add v{number} type veth peer name eth0 netns {inner}", f"set v{number} master br0 up"):
                    link = ["nsenter", f"--target={self.controller}", "--net", "ip", "link", *line.split()]
                    subprocess.run(link, check=True)
                self.start_daemon(name)
            self.wait_for(lambda: self.run("sinfo", "-ho", "%D %T").strip() == "2 idle", "two idle nodes", 60)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, AssertionError | subprocess.CalledProcessError):
                raise NoCluster(f"SLURM does not start here: {error}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.controller:
            os.kill(self.controller, signal.SIGKILL)  # the first process of the namespace: the rest ends with it
        for process in self._started:
            process.kill()
            process.wait()

    def start_daemon(self, node: str) -> None:
        self._start([*self._inside(self.nodes[node]), "slurmd", "-D", "-N", node])

    def run(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints on the controller's host."""
        done = subprocess.run(
            [*self._inside(self.controller, cwd), *map(str, command)],
            env=self._environment() | environment, check=True, text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.stdout

    def processes(self, node: str) -> dict[int, str]:
        """Process number (ours, not the node's) -> command line, of everything that runs on a node but its init."""
        namespace, found = os.readlink(f"/proc/{self.nodes[node]}/ns/pid"), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has ended meanwhile
                continue
        return {
            pid: line for pid, line in found.items() if line and not line.startswith(("bash node.sh", "sleep 3600"))
        }

    def kill(self, node: str, command: str) -> None:
        """Kill the processes of a node whose command line begins like this."""
        pids = [pid for pid, line in self.processes(node).items() if line.startswith(command)]
        assert pids, (command, self.processes(node))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def wait_for(self, happened: Callable[[], object], what: str, seconds: float = 400) -> None:
        give_up_at = time.monotonic() + seconds
        while not happened():
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
            assert time.monotonic() < give_up_at, f"not {what}:\n{self.run('squeue')}\n{logs}"
            time.sleep(0.2)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self, command: list[str]) -> subprocess.Popen:
        with (self.folder / "out.log").open("a") as output:
            self._started.append(
                subprocess.Popen(command, cwd=self.folder, env=self._environment(), stdout=output, stderr=output)
            )
        return self._started[-1]

    def _inside(self, pid: int, cwd: Path | None = None) -> list[str]:
        namespaces = ["nsenter", f"--target={pid}", "--mount", "--uts", "--net", "--pid"]
        return [*namespaces, "env", f"--chdir={cwd or self.folder}"]  # the working directory is not kept

    @staticmethod
    def _child(pid: int) -> int:
        """The first child of a process, as soon as it has one."""
        for _ in range(400):
            children = Path(f"/proc/{pid}/task/{pid}/children")
            if children.exists() and (pids := children.read_text().split()):
                return int(pids[0])
            time.sleep(0.05)
        raise AssertionError(f"process {pid} has started nothing")
