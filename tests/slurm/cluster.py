"""A real Slurm of several nodes on this machine, in one directory, for tests. Needs root and Debian's slurm packages.

A node is a slurmd in namespaces of its own (UTS, PID, mount): its own host name n1.., loopback address 127.0.1.1.., and
/etc/hosts, and one kill takes all its processes, as a power cut would. Nothing of the machine's own is touched.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv")
# The shell of a node. $0 its name, $1 the cluster's directory.
NODE = 'hostname "$0"; mount --bind "$1/hosts" /etc/hosts; slurmd -D -N "$0" -f "$1/slurm.conf" & wait $!'
NAMESPACES = ["unshare", "-u", "-m", "--propagation=slave", "--mount-proc", "-p", "-f", "--kill-child=KILL"]
# Short times, or a test of a lost node would take minutes. Credentials that expire late delay every requeue.
CONF = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/state/slurmctld.pid
SlurmdPidFile={directory}/spool/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=10
KillWait=10
MinJobAge=86400
FirstJobId={port}
ReturnToService=2
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here. Empty if there can."""
    absent = [program for program in PROGRAMS if not shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin")]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        return "namespaces need root"
    return ""


class Cluster:
    """Context of a cluster that is up: nodes n1.., partitions main and urgent, which preempts main."""

    def __init__(self, directory: Path, nodes: int, cpus: int = 8) -> None:
        # Another cluster on this machine has other ports, and job numbers, from which jobs make theirs.
        port = 10000 + os.getpid() % 900 * 10
        self.directory, self.names = directory, [f"n{i}" for i in range(1, nodes + 1)]
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        for name in ("munge", "state", "spool", "log"):
            (directory / name).mkdir(parents=True)
        key = directory / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        hosts = [f"127.0.1.{i} {name}\n" for i, name in enumerate(self.names, 1)]
        (directory / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(hosts))
        lines = [
            f"NodeName={name} NodeAddr=127.0.1.{i} Port={port + i} CPUs={cpus} RealMemory=1000000"
            for i, name in enumerate(self.names, 1)
        ]
        conf = CONF.format(port=port, directory=directory, nodes="\n".join(lines))
        (directory / "slurm.conf").write_text(conf)

    def __enter__(self) -> "Cluster":
        try:
            for name in ("munged", "slurmctld", *self.names):
                self.start(name)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in (*self.names, "slurmctld", "munged"):
            self.kill(name)

    def start(self, name: str) -> None:
        munge = self.directory / "munge"
        command = {
            "munged": [
                # A temporary directory is not for all to enter, which it would complain of.
                *("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"),
                *(f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
            ],
            "slurmctld": ["slurmctld", "-D", "-f", str(self.directory / "slurm.conf")],
        }.get(name, [*NAMESPACES, "bash", "-c", NODE, name, str(self.directory)])
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                # Nothing outlives this process, however it ends.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        if name == "munged":
            self.wait_for((munge / "socket").exists, 10, "munged")

    def kill(self, name: str) -> None:
        """Cut the power of a node: its daemon, steps and tasks die at once. Or kill another daemon."""
        if process := self.processes.pop(name, None):
            process.send_signal(signal.SIGKILL)
            process.wait()

    def on_node(self, name: str, *command: str) -> str:
        """Run a command in the namespaces of a node."""
        target = (
            Path(f"/proc/{self.processes[name].pid}/task/{self.processes[name].pid}/children").read_text().split()[0]
        )
        return self.run("nsenter", f"--target={target}", "--uts", "--mount", "--pid", *command)

    def run(self, *command: str) -> str:
        """What a command prints. Raises CalledProcessError, with its stderr as a note."""
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        if result.returncode:
            error = subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)
            error.add_note(result.stdout + result.stderr)
            raise error
        return result.stdout

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait_for_job(self, job: str, *states: str, seconds: float = 300) -> str:
        """The state in which a job is as one of these. Raises TimeoutError if it does not get there."""
        self.wait_for(lambda: self.state(job) in states, seconds, f"job {job} to be {' or '.join(states)}")
        return self.state(job)

    def wait_for_nodes(self) -> None:
        states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t")
        self.wait_for(lambda: set(self.run(*states).split()) <= {"idle", "mix", "alloc"}, 30, "all nodes to answer")

    def wait_for(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}: see {self.directory}")
            time.sleep(0.2)
