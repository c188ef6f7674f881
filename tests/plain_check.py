"""Run the commands of an installed covcli without its extras, far from its source.

    python tests/plain_check.py

Run it by the Python of an environment that has the wheel and nothing else. Every command works, and
what needs an extra is refused in one line that names it. It takes a minute.
"""

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLUGIN = Path(__file__).resolve().with_name("tiny_model.py")
RUN = "runs/tiny"
WORK = f"""
train --trusted digits --model tiny --epochs 6 --calibration-split .25 --name tiny --plugin {PLUGIN}
build-signature {RUN}/checkpoint.pt --plugin {PLUGIN}
build-signature {RUN}/checkpoint.pt --method src --output b.st --plugin {PLUGIN}
evaluate --untrusted photos?limit=50 --untrusted attack:adaptive-pgd?limit=5 --plugin {PLUGIN}
report
check digits?split=test&limit=20 --plugin {PLUGIN}
check digits?split=test&limit=20 --drift 0.01 --drift-state state.drift --plugin {PLUGIN}
compare {RUN} {RUN}
inspect {RUN}
inspect {RUN}/checkpoint.pt
list
export --output monitor.pt2 --plugin {PLUGIN}
"""
REFUSED = f"""
attacks: evaluate --untrusted attack:fgsm --force --plugin {PLUGIN}
onnx: export --output monitor.onnx --plugin {PLUGIN}
baselines: evaluate --baseline knn --untrusted photos --force --plugin {PLUGIN}
timm: points --model timm:resnet18
"""
EXTRAS = {"attacks": "foolbox", "onnx": "onnx", "baselines": "pytorch_ood", "timm": "timm"}


def covcli(line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "covcli", *line.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def faults() -> Iterator[str]:
    """Yield what went wrong."""
    for line in WORK.split("\n")[1:-1]:
        done = covcli(line)
        if done.returncode != 0 or "Traceback" in done.stderr:
            yield f"covcli {line}: ended with {done.returncode}\n{done.stdout}{done.stderr}"
    for line in REFUSED.split("\n")[1:-1]:
        extra, _, arguments = line.partition(": ")
        if importlib.util.find_spec(EXTRAS[extra]):
            yield f"{EXTRAS[extra]} is installed here"
            continue
        done = covcli(arguments)
        if done.returncode != 2 or f"covcli[{extra}]" not in done.stderr.replace("\n", ""):
            yield f"covcli {arguments}: ended with {done.returncode}\n{done.stdout}{done.stderr}"


def main() -> None:
    found = importlib.util.find_spec("covcli")
    if found is None or found.origin is None or "site-packages" not in found.origin:
        sys.exit("covcli is not installed from a wheel here")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        wrong = list(faults())
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
