"""What is computed on a device is what is computed on the CPU; see `simulated_device`."""

import subprocess
import sys
from pathlib import Path


def test_on_a_device_everything_is_as_on_the_cpu() -> None:
    """In a process of its own, since torch registers a device for good."""
    worker = Path(__file__).with_name("device_worker.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "method ensemble\n" in done.stdout
