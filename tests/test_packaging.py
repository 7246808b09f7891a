"""The wheel holds the package and runs away from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what belongs to the package."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    source = tmp_path_factory.mktemp("source")
    names = ["lightning_grpo", "callbacks", "conf", "tools", "tests"]
    names += ["setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    copy = ["cp", "-a", *(str(ROOT / name) for name in names), str(source)]
    subprocess.run(copy, check=True)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-w", str(folder), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("callbacks", "conf", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".json"} and "__pycache__" not in path.parts:
                assert f"lightning_grpo/{path.relative_to(ROOT).as_posix()}" in names
    for path in (ROOT / "lightning_grpo").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "lightning_grpo/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_grpo"}
    assert not any("test" in name or "__pycache__" in name for name in names)


def test_the_metadata_names_the_command_and_the_dependencies(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    text = archive.read(metadata).decode()
    assert "Name: lightning-grpo" in text and re.search(r"License.*: Apache-2\.0", text)
    for requirement in ("torch>=2.10", "lightning<2.7,>=2.6.6", "transformers>=5.3"):
        assert f"Requires-Dist: {requirement}" in text
    (scripts,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "lightning-grpo = lightning_grpo.cli:main" in archive.read(scripts).decode()


def test_an_unpacked_wheel_runs_in_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # The name proves that the configuration is read from the wheel.
    quickstart = site / "lightning_grpo/conf/quickstart.yaml"
    quickstart.write_text(quickstart.read_text().replace("name: quickstart", "name: unpacked"))
    done = subprocess.run(
        [sys.executable, "-m", "lightning_grpo", "fit", "--print_config"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["run"]["name"] == "unpacked"
    assert list(elsewhere.iterdir()) == []
