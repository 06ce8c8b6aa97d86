"""The runner and the rules that hold the project together."""

from __future__ import annotations

import re
import subprocess
import time
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MAKEFILE = (PROJECT / "Makefile").read_text()
CONFIG = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def test_every_target_is_described_in_the_help():
    declared = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert declared
    help_text = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in help_text.splitlines() if line} >= set(declared[1].split())


def test_setup_takes_no_time_when_nothing_is_missing():
    subprocess.run(["make", "setup"], cwd=PROJECT, capture_output=True, check=True)
    began = time.monotonic()
    subprocess.run(["make", "setup"], cwd=PROJECT, capture_output=True, check=True)
    assert time.monotonic() - began < 1


def test_the_continuous_integration_runs_make_test():
    assert "exec make test" in (PROJECT / ".ci/run").read_text()
    assert (PROJECT / ".ci/run").stat().st_mode & 0o111


def test_every_ignored_rule_has_its_reason():
    lines = (PROJECT / "pyproject.toml").read_text().splitlines()
    ignores = lines[lines.index("ignore = [") + 1 :]
    ignores = ignores[: ignores.index("]")]
    assert [line for line in ignores if "#" not in line] == []


def test_the_layers_are_checked():
    contracts = {contract["type"] for contract in CONFIG["tool"]["importlinter"]["contracts"]}
    assert contracts == {"independence", "forbidden", "layers"}


def test_only_the_architecture_layer_may_ask_for_the_machine(tmp_path: Path):
    ruff = [str(PROJECT / ".venv/bin/ruff"), "check", "--select=TID251", "--no-cache", "-", "--stdin-filename"]
    source = "import platform\n\nplatform.machine()\n"
    for file, status in [("agent/engine/x.py", 1), ("migrate/x.py", 1), ("agent/arch/x.py", 0)]:
        done = subprocess.run([*ruff, file], cwd=PROJECT, input=source, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout
