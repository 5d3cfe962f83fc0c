"""Machines made of namespaces of this one: each with processes, network, home, /tmp and name of its own, and an SSH
server.

All of them, and a switch between them, are inside one more set of namespaces, the lab, in which the caller runs, too:
nothing in it reaches the machine's own network, and when the caller ends, however it ends, the kernel ends every
process of it and forgets the rest. Needs root, and the programs ip, sshd, ssh-keygen and unshare.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

SUBNET = "10.77.0"
SWITCH = "switch"
LAB = "PROFILE_SERVICE_LAB"
"""Set inside the lab."""

SSH_TIMEOUT_S = 60.0

# A machine's first process: it mounts what is its own, and stays to collect whatever ends.
_BOOT = r"""
set -eu
hostname "$NAME"
mount --bind "$DISK/passwd" /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 0755 /run/sshd
mount --bind "$DISK/tmp" /tmp
read -r _  # until the network is there
/usr/sbin/sshd -D -e -f /tmp/home/.ssh/sshd_config &
while :; do wait -n || true; done
"""


def enter_lab() -> None:
    """Runs this program again inside the lab, in place of this process; returns there."""
    if os.environ.get(LAB):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp"], check=True)  # noqa: S108
        for command in (
            f"link add {SWITCH} type bridge",
            f"address add {SUBNET}.254/24 dev {SWITCH}",
            f"link set {SWITCH} up",
            "link set lo up",
        ):
            _ip(command)
        return
    flags = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
    again = ["unshare", *flags, sys.executable, *sys.orig_argv[1:]]
    os.execvpe("unshare", again, {**os.environ, LAB: "1"})  # noqa: S606


class Host:
    """One machine, on from the start.

    Args:
        number: 1 to 253; its address is SUBNET.number.
        path: what stands first in its PATH.
    """

    def __init__(self, number: int, path: Path) -> None:
        self.address = f"{SUBNET}.{number}"
        self._name = f"host{number}"
        self._disk = Path("/tmp/hosts") / self._name  # noqa: S108
        home = self._disk / "tmp" / "home"
        (home / ".ssh").mkdir(parents=True)
        passwd = Path("/etc/passwd").read_text().splitlines()
        (self._disk / "passwd").write_text(
            "\n".join("root:x:0:0:root:/tmp/home:/bin/bash" if line.startswith("root:") else line for line in passwd)
        )
        # Ray's commands come by SSH, and read this first.
        (home / ".bashrc").write_text(f"export PATH={path}:$PATH\n")
        shutil.copy(private_key().with_suffix(".pub"), home / ".ssh" / "authorized_keys")
        _make_key(home / ".ssh" / "host_key")
        (home / ".ssh" / "sshd_config").write_text(
            "HostKey /tmp/home/.ssh/host_key\nPermitRootLogin yes\nUsePAM no\nStrictModes no\nPidFile none\n"
            "Subsystem sftp internal-sftp\n"
        )
        self.switch_on()

    def switch_on(self) -> None:
        """Starts the machine with the disk that it had; returns when it can be logged into."""
        flags = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        self._process = subprocess.Popen(
            ["unshare", *flags, "bash", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=(self._disk / "log").open("ab"),
            env={**os.environ, "NAME": self._name, "DISK": str(self._disk)},
        )
        inside = _child_of(self._process.pid)
        # The card keeps its address, as a machine's does: the others go on knowing it.
        card = f"address 02:00:00:00:00:{int(self.address.rpartition('.')[2]):02x}"
        _ip(f"link add {self._name} type veth peer name eth0 {card} netns {inside}")
        _ip(f"link set {self._name} master {SWITCH} up")
        for command in (
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            # It leads nowhere. Ray takes the address from which the way into the world begins.
            f"route add default via {SUBNET}.254",
        ):
            subprocess.run(["nsenter", "--net", "--target", str(inside), "ip", *command.split()], check=True)
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.close()
        give_up_at = time.monotonic() + SSH_TIMEOUT_S
        while True:
            try:
                socket.create_connection((self.address, 22), timeout=1).close()
            except OSError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.1)
            else:
                return

    def switch_off(self) -> None:
        """All its processes are gone at once, and so is its network; its disk stays."""
        self._process.kill()
        self._process.wait()
        # The kernel would come to it, too, when it has ended the last process.
        _ip(f"link delete {self._name}")

    def processes(self) -> list[str]:
        """Command lines of what runs on it."""
        found = []
        inside = Path(f"/proc/{_child_of(self._process.pid)}/ns/pid").readlink()
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdigit() and (process / "ns" / "pid").readlink() == inside:
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return [line for line in found if line]


def private_key() -> Path:
    """The key that opens every host."""
    path = Path("/tmp/key")  # noqa: S108
    if not path.exists():
        _make_key(path)
    return path


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    give_up_at = time.monotonic() + SSH_TIMEOUT_S
    while not (found := children.read_text().split()):
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"process {pid} has started nothing")
        time.sleep(0.01)
    return int(found[0])
