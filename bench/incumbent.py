"""Owns the incumbent: Postfix that hands over to Dovecot's LMTP, from Debian's packages, as instances on loopback ports.

Both as a distribution sets them up: Maildir, Dovecot's default fsync of LMTP deliveries, Postfix's defaults. Raised are only
the limits on connections from one client, which a bench meets and users do not. Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from bench.ours import MAILBOXES, PASSWORD, mailbox

_DELIVERED_WITHIN_S = 60.0
_DOVECOT = """
base_dir = {root}/dovecot-run
state_dir = {root}/dovecot-state
log_path = {root}/dovecot.log
protocols = lmtp pop3
ssl = no
disable_plaintext_auth = no
mail_location = maildir:{root}/mail/%n
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {root}/users
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={root}/mail/%n
}}
mail_max_userip_connections = 1000
first_valid_uid = 1
first_valid_gid = 1
service lmtp {{
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {lmtp}
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    address = 127.0.0.1
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service pop3 {{
  process_limit = 1024
}}
"""

_MASTER = """
127.0.0.1:{smtp} inet n - n - 200 smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
lmtp unix - - n - - lmtp
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


def installed() -> bool:
    """True if the programs are there and we may start them."""
    return os.geteuid() == 0 and all(
        map(os.path.exists, ("/usr/sbin/postfix", "/usr/lib/dovecot/lmtp", "/usr/lib/dovecot/pop3"))
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Incumbent:
    """Postfix and Dovecot with the same 1,000 mailboxes."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="incumbent-bench-"))
        self.ports = {"smtp": _free_port(), "lmtp": _free_port(), "pop3": _free_port()}
        self._seen = 0

    async def start(self) -> None:
        """Writes their settings and starts them."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        root = self.root
        root.chmod(0o755)
        owner = os.stat("/var/lib/postfix").st_uid  # any plain user will do for the mail
        (root / "mail").mkdir()
        os.chown(root / "mail", owner, owner)
        (root / "users").write_text("".join(f"{mailbox(n)}:{{PLAIN}}{PASSWORD}::::::\n" for n in range(MAILBOXES)))
        (root / "dovecot.conf").write_text(_DOVECOT.format(root=root, uid=owner, gid=owner, **self.ports))
        (root / "dovecot.conf").chmod(0o644)
        subprocess.run(["dovecot", "-c", str(root / "dovecot.conf")], check=True)
        etc = root / "postfix"
        etc.mkdir()
        (etc / "master.cf").write_text(_MASTER.format(**self.ports))
        (etc / "recipients").write_text("".join(f"{mailbox(n)} x\n" for n in range(MAILBOXES)))
        (root / "queue").mkdir()
        (root / "state").mkdir()
        os.chown(root / "state", owner, -1)
        (etc / "main.cf").write_text(
            f"""
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/state
maillog_file_prefixes = {root}
maillog_file = {root}/postfix.log
myhostname = bench.example
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks =
smtpd_recipient_restrictions = reject_unauth_destination
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
virtual_mailbox_domains = bench.example
virtual_mailbox_maps = hash:{etc}/recipients
virtual_transport = lmtp:inet:127.0.0.1:{self.ports["lmtp"]}
virtual_destination_concurrency_limit = 20
"""
        )
        subprocess.run(["/usr/sbin/postmap", "-c", str(etc), f"hash:{etc}/recipients"], check=True)
        subprocess.run(["/usr/sbin/postfix", "-c", str(etc), "start"], check=True, capture_output=True)

    def roots(self) -> list[int]:
        """The two masters."""
        return [int((self.root / name).read_text().split()[0]) for name in ("dovecot-run/master.pid", "queue/pid/master.pid")]

    async def delivered(self, count: int) -> None:
        """Waits until nothing is queued any more and so many more messages lie in the Maildirs."""
        async with asyncio.timeout(_DELIVERED_WITHIN_S):
            while await asyncio.to_thread(self._queued):
                await asyncio.sleep(0.02)
        self._seen += count
        found = await asyncio.to_thread(self._found)
        assert found == self._seen, f"{found} of {self._seen} delivered"

    def _queued(self) -> bool:
        for name in ("incoming", "active", "deferred", "maildrop"):
            for _, _, files in os.walk(self.root / "queue" / name):
                if files:
                    return True
        return False

    def _found(self) -> int:
        return sum(
            len(list((box / part).iterdir()))
            for box in (self.root / "mail").iterdir()
            for part in ("new", "cur")
            if (box / part).exists()
        )

    async def stop(self) -> None:
        """Ends them and clears away."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        subprocess.run(["/usr/sbin/postfix", "-c", str(self.root / "postfix"), "stop"], check=False, capture_output=True)
        with contextlib.suppress(OSError, ValueError):
            subprocess.run(["doveadm", "-c", str(self.root / "dovecot.conf"), "stop"], check=False, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)
