"""The README's first steps, word for word: its app, its commands and its Python, with only what its install installs.

What must stay true: nothing is repeated here; what runs is cut out of the README. The quick test hides every extra from
this environment; CI also makes an empty one and installs into it as the README says.
"""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
(APP,) = [block for block in BLOCKS if "class Transaction(Event)" in block]
(PYTHON,) = [block for block in BLOCKS if 'Engine("shop.py")' in block]
(CURL,) = re.findall(r"^    (curl \S* ?http://127.0.0.1:8000/v1/score/.*)$", README, re.MULTILINE)
REDIS = re.findall(r"^    redis-cli -p 6380 PENSTOCK\.(\w+) (\w+) (.*)$", README, re.MULTILINE)

# Packages that `pip install .` brings, by the names under which they are imported; what they need themselves is beside.
BASE = ("numpy", "msgspec", "uvloop", "httptools", "redis", "hiredis", "penstock")
HIDE = f"""
import importlib.machinery, sys
class Base(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        top, origin = name.partition(".")[0], str(getattr(found, "origin", ""))
        if found is not None and "site-packages" in origin and top not in {BASE!r}:
            return None
        return found
sys.meta_path[:] = [Base if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


def steps(python, cwd, environment):
    """Everything of "An app": check, serve and its curl, the Python block."""
    (cwd / "shop.py").write_text(APP)

    def run(*arguments):
        done = subprocess.run(
            [*python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "Pipeline fraud on Transaction" in run("-m", "penstock", "check", "shop.py")
    shown = run("-c", PYTHON)
    assert shown.startswith("approve () {'limit': '")
    assert "'spend.count_1h': 1" in shown
    assert "'night': " in shown
    command = [*python, "-m", "penstock", "serve", "shop.py", "--port", "0"]
    server = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout:
            found = re.search(r"serving shop on http://127.0.0.1:(\d+)", line)
            if found:
                break
        asked = CURL.replace(":8000/", f":{found[1]}/")
        for _ in range(2):
            answer = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=20).stdout
            assert '"action":"approve"' in answer, answer
            assert '"outcome":"applied"' in answer, answer
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_first_steps_without_any_extra(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    paths = [str(hidden), str(ROOT / "engine")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_")}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error::RuntimeWarning"}
    for name in ("numba", "pyarrow", "pandas"):
        code = f"import importlib.util; assert importlib.util.find_spec({name!r}) is None"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    steps([sys.executable], tmp_path, environment)


def test_dates_of_the_readme_are_of_today():
    """Its commands follow each other: an event with a date of long ago would be late after one of today."""
    assert REDIS
    for verb, subject, payload in [("SCORE", "fraud", CURL.partition("-d ")[2]), *REDIS]:
        said = subprocess.run(["bash", "-c", f"printf %s {payload}"], capture_output=True, text=True, check=True).stdout
        assert time.strftime('"at": "%Y-%m-', time.gmtime()) in said, (verb, subject, said)
    assert not re.search(r'"at": "\d{4}-', README)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("CI") != "true", reason="builds the package anew: in CI only")
def test_first_steps_after_the_readmes_install(tmp_path):
    (install,) = re.findall(r"`(pip install \.)`", README)
    venv = tmp_path / "v"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=300)
    done = subprocess.run(
        [venv / "bin" / "python", "-m", *install.split()], cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    if done.returncode and re.search(r"Could not find a version|ConnectionError|No matching distribution", done.stderr):
        pytest.skip(f"pip cannot install here: {textwrap.shorten(done.stderr, 300)}")
    assert done.returncode == 0, done.stderr[-3000:]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PENSTOCK_", "PYTHON"))}
    steps([str(venv / "bin" / "python")], tmp_path, environment)
