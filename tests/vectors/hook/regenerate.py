"""
Make the recordings in this directory again, with the C{nix-build} on C{PATH} and its own build hook::

    python tests/vectors/hook/regenerate.py

Per case of L{CASES}: C{<case>.in}, what Nix sends to the first hook process that it starts, and C{<case>.out}, what
that answers. Made with Nix 2.8. Needs C{busybox}, static, and a place for stores at L{ROOT}, which is removed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

VECTORS = Path(__file__).parent

ROOT = Path("/tmp/nixserve-hook-vectors")
"""Settings with paths below it stand in the recordings, hence the same place always."""

REACHED = f"ssh://localhost?remote-store={ROOT}/there x86_64-linux - 2 1 foo,big"

CASES = {
    "built": REACHED,
    "failing": REACHED,
    "foreign": f"{REACHED}; ssh://other - - 3 2 - kvm",
    "busy": f"ssh://localhost?remote-store={ROOT}/there x86_64-linux - 0",
    "unreachable": "ssh://-nowhere; ssh://-neither",
    "nothing": "# no machine",
}
"""What the setting C{builders} is. The attribute to build is of the same name; C{failing} if there is none."""

RUN_SECONDS = 3
"""How long a build may take. While all machines are busy, Nix would ask for ever."""


def environment(hook, busybox):
    """What Nix finds in its environment."""
    settings = {
        "substituters": "",
        "build-users-group": "",
        "sandbox": "true",
        "sandbox-paths": f"/bin/sh={busybox}",
        "system-features": "foo big",
        "build-hook": hook,
    }
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(ROOT / "home"),
        "TMPDIR": str(ROOT),
        "NIX_CONF_DIR": str(ROOT / "conf"),
        "NIX_REMOTE": str(ROOT / "here"),
        "NIX_CONFIG": "".join(f"{name} = {value}\n" for name, value in settings.items()),
    }


def hookOf(variables):
    """The program that Nix uses when nobody says otherwise."""
    command = ["nix", "--extra-experimental-features", "nix-command", "show-config"]
    without = {name: value for name, value in variables.items() if name != "NIX_CONFIG"}
    shown = subprocess.run(command, env=without, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("build-hook = "))
    return line.partition(" = ")[2]


def record(case, builders):
    """Have Nix build, and keep what it said to its hook."""
    shutil.rmtree(ROOT, ignore_errors=True)
    for name in ("home", "conf", "recorded"):
        (ROOT / name).mkdir(parents=True)
    script = ROOT / "hook"
    variables = environment(str(script), shutil.which("busybox"))
    script.write_text(
        f'#!/bin/sh\nexec {sys.executable} {VECTORS.resolve()}/relay.py {ROOT}/recorded {hookOf(variables)} "$@"\n'
    )
    script.chmod(0o755)
    attribute = case if case in ("built", "foreign") else "failing"
    command = ["nix-build", str(VECTORS / "derivations.nix"), "-A", attribute, "--no-out-link"]
    command += ["--max-jobs", "0", "--builders", builders]
    building = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE)
    try:
        _, said = building.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        building.terminate()
        _, said = building.communicate()
    print(f"--- {case}: exit {building.returncode}\n{said.decode(errors='replace')}")
    for kind in ("in", "out"):
        shutil.copyfile(ROOT / "recorded" / f"0.{kind}", VECTORS / f"{case}.{kind}")
    # Nix makes what it stores read-only, which would keep it from being deleted.
    subprocess.run(["chmod", "-R", "u+w", str(ROOT)], check=True)
    shutil.rmtree(ROOT)


def main():
    """Replace the recordings."""
    for case, builders in CASES.items():
        record(case, builders)


if __name__ == "__main__":
    main()
