"""The program as an operator meets it: exit status, one clear sentence, nothing half-made."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from powermail.directory.password import judge
from powermail.directory.reasons import Reason
from tests.system.conftest import DOORS

FREE = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')]


def powermail(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return subprocess.run(
        [sys.executable, "-m", "powermail", *words], capture_output=True, text=True, timeout=60, check=False, input=given
    )


def make(data: Path) -> None:
    """A new installation; its segments are small, so that no command looks through much unused room."""
    assert powermail("init", "--data", str(data)).returncode == 0
    settings = data / "powermail.toml"
    settings.write_text(settings.read_text().replace("[cluster]\n", "[cluster]\nsegment_octets = 1048576\n"))


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("powermail: ")]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return line


def test_port_in_use_is_said_and_nothing_stays(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = powermail("serve", "--init", "--data", str(data), *FREE, "--set", f'smtp.listen=["127.0.0.1:{port}"]')
    assert f"cannot listen on 127.0.0.1:{port}" in sentence(done)
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_and_places_are_said(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    assert powermail("init", "--data", data).returncode == 0
    assert "not empty" in sentence(powermail("init", "--data", data))
    assert "did you mean 'smtp.listen'" in sentence(powermail("serve", "--data", data, "--set", "smtp.listn=1"))
    assert "powermail init" in sentence(powermail("serve", "--data", str(tmp_path / "none")))
    assert "cannot make" in sentence(powermail("init", "--data", "/proc/nowhere/data"))
    assert "rebuild --yes` sets it aside" in sentence(powermail("rebuild", "--data", data))


def test_accounts_and_reports_without_a_server(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "data"), "--json"]
    make(tmp_path / "data")
    made = powermail("account", "add", "ann@example.org", "--quota", "20M", "--password-stdin", *data, given="secret\n")
    assert json.loads(made.stdout)["quota_octets"] == 20 * 2**20
    assert json.loads(made.stdout)["password"] == "argon2id"
    assert "not a size" in sentence(powermail("account", "set", "ann@example.org", "--quota", "20X", *data))
    assert "refuses" in sentence(powermail("account", "add", "ANN@example.org", "--password", "x", *data))
    for bad in ("a@b.c\r\nX: y", "two@a.b three@c.d", "-froot@a.b", "a>@b.c"):
        assert "not an address" in sentence(powermail("forward", "add", "f@example.org", *data, "--", bad))
    assert powermail("forward", "add", "f@example.org", "x@example.net", "--keep-copy", *data).returncode == 0
    rows = json.loads(powermail("account", "list", *data).stdout)
    assert [row["address"] for row in rows] == ["ann@example.org", "f@example.org", "postmaster@localhost"]
    assert json.loads(powermail("usage", "ann@example.org", *data).stdout)["octets"] == 0
    assert powermail("verify", *data).returncode == 0
    assert powermail("node", "list", *data).returncode == 0
    assert powermail("node", "block", "a", *data).returncode == 0
    assert powermail("node", "list", *data).returncode == 1
    assert json.loads(powermail("whatif", "b", *data).stdout)["unreadable"]["messages"] == 0


def test_a_password_hash_works_as_a_row(tmp_path: Path) -> None:
    done = powermail("password", "hash", "--password-stdin", given="secret\n")
    assert judge(done.stdout.strip(), "secret") is None
    assert judge(done.stdout.strip(), "Secret") is Reason.WRONG_PASSWORD


def test_a_missing_node_is_degraded_and_never_made_silently(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make(data)
    (data / "nodes" / "a").rename(tmp_path / "gone")
    (data / "nodes" / "a").mkdir()
    done = powermail("node", "list", "--data", str(data), "--json")
    assert done.returncode == 1
    assert "is its disk mounted" in json.loads(done.stdout)[0]["reason"]
    assert list((data / "nodes" / "a").iterdir()) == []
    (data / "nodes" / "a").rmdir()
    (tmp_path / "gone").rename(data / "nodes" / "b-was-here")
    (data / "nodes" / "b").rename(data / "nodes" / "a")
    done = powermail("node", "list", "--data", str(data), "--json")
    assert "swapped or cloned" in json.loads(done.stdout)[0]["reason"]


def test_secrets_that_everybody_may_read_are_refused(tmp_path: Path) -> None:
    """X07, A20: what we make is ours alone, and a secret that is not is said."""
    data = tmp_path / "data"
    make(data)
    modes = {path.name: path.stat().st_mode & 0o077 for path in data.rglob("*")}
    assert set(modes.values()) == {0}, modes
    key = data / "tls" / "key.pem"
    key.chmod(0o644)
    assert "chmod o-rwx" in sentence(powermail("serve", "--data", str(data), *FREE))
    key.chmod(0o600)
    secret = data / "password"
    secret.write_text("x")
    secret.chmod(0o604)
    words = ("--set", "outbound.smarthost=127.0.0.1:1", "--set", "outbound.smarthost_password_file=password")
    assert "everybody may read it" in sentence(powermail("node", "list", "--data", str(data), *words))
    secret.chmod(0o600)
    assert powermail("node", "list", "--data", str(data), *words).returncode == 0
