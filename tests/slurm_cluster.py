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
from contextlib import suppress
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
SlurmdTimeout=10
SchedulerParameters=bf_interval=1,sched_interval=1
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
TaskPlugin=task/affinity
TaskPluginParam=autobind=cores
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
NodeName=node[1-2] CPUs={cpus} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES State=UP
"""
"""Each node has this machine's cores and one GPU, which is /dev/null. A requeued job may start after ``cred_expire``
seconds, a silent node counts as lost after ``SlurmdTimeout``; SLURM's own values are 120 and 300."""

HOSTS = """
127.0.0.1 localhost
10.77.0.1 control
10.77.0.11 node1
10.77.0.12 node2
"""
CONTROLLER = "mount --make-rprivate / && mount --bind hosts /etc/hosts && hostname control && exec slurmctld -D"
NODE = "hostname {name} && while sleep 3600; do :; done"
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
        configuration = CONFIGURATION.format(folder=self.folder, cpus=os.cpu_count())
        files = {"slurm.conf": configuration, "gres.conf": "Name=gpu File=/dev/null\n", "hosts": HOSTS,
                 "cgroup.conf": "CgroupPlugin=cgroup/v1\n"}  # fmt: skip
        for name, text in files.items():
            (self.folder / name).write_text(text)
        try:
            # The signal: no cluster outlives the tests, whatever ends them.
            self._start(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", *NAMESPACES, "bash", "-c", CONTROLLER])
            self.controller = self._child(self._started[0].pid)
            for line in ("link set lo up", "link add br0 up type bridge", "addr add 10.77.0.1/24 dev br0"):
                self._ip(self.controller, line)
            for number, name in enumerate(NODES, start=1):
                script = NODE.format(name=name)
                node = self._start([*self._inside(self.controller), "unshare", *NAMESPACES, "bash", "-c", script])
                self.nodes[name] = inner = self._child(self._child(node.pid))
                self._ip(self.controller, f"link add v{number} type veth peer name eth0 netns {inner}")
                self._ip(self.controller, f"link set v{number} master br0 up")
                for line in ("link set lo up", f"addr add 10.77.0.1{number}/24 dev eth0", "link set eth0 up"):
                    self._ip(inner, line)
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
        init, found = self.nodes[node], {}
        namespace = Path(f"/proc/{init}/ns/pid").readlink()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns/pid").readlink() == namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has ended meanwhile
                continue
        return {pid: line for pid, line in found.items() if pid != init and line not in ("", "sleep 3600")}

    def kill(self, node: str, command: str, first: bool = False) -> None:
        """Kill the processes of a node whose command line begins like this, or the first of them alone."""
        pids = [pid for pid, line in self.processes(node).items() if line.startswith(command)]
        assert pids, (command, self.processes(node))
        for pid in [min(pids)] if first else sorted(pids, reverse=True):  # children first: srun's acts when it dies
            with suppress(ProcessLookupError):  # one of them ended with another
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
    def _ip(pid: int, line: str) -> None:
        subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", *line.split()], check=True)

    @staticmethod
    def _child(pid: int) -> int:
        """The first child of a process, as soon as it has one."""
        for _ in range(400):
            children = Path(f"/proc/{pid}/task/{pid}/children")
            if children.exists() and (pids := children.read_text().split()):
                return int(pids[0])
            time.sleep(0.05)
        raise AssertionError(f"process {pid} has started nothing")
