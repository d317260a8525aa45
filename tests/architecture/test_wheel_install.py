"""The wheel, installed where no repository is in sight, does what the editable install does."""

import fnmatch
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INGREDIENTS = ("pyproject.toml", "README.md", "LICENSE", "qoq_cli", "calib", "formats", "kernels", "recipes")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run without anything that leads back to the repository or to a network."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    result = subprocess.run(
        command, cwd=cwd, env=env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no earlier build can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in INGREDIENTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, cwd=source)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: the wheel is its own, the dependencies are borrowed from this one.

    A plain line in a .pth file adds the folder without running the .pth files in it, so the editable install that this
    environment may hold stays out of sight.
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_data_files_are_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for pattern in (
        "qoq/recipes/presets/*.yaml",
        "qoq/recipes/families/*.py",
        "qoq_cli/demo/tiny/config.json",
        "qoq_cli/demo/tiny/*.safetensors",
        *(f"{room}/py.typed" for room in ("qoq_cli", "qoq/calib", "qoq/formats", "qoq/kernels", "qoq/recipes")),
        "qoq-*.dist-info/licenses/LICENSE",
    ):
        assert fnmatch.filter(names, pattern), f"no {pattern} in {wheel.name}"


def test_it_owns_only_our_names(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"qoq", "qoq_cli"}


def test_modules_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    probe = (
        "import importlib, importlib.util\n"
        "for name in ('qoq_cli', 'qoq.recipes', 'qoq.formats', 'qoq.calib'):\n"
        "    print(importlib.import_module(name).__file__)\n"
        "print(importlib.util.find_spec('kernels') and importlib.util.find_spec('kernels').origin)\n"
    )
    *files, kernels = run(installed / "python", "-c", probe, cwd=tmp_path).stdout.split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert not kernels.startswith(str(ROOT / "kernels"))


def test_help_and_recipes(installed: Path, tmp_path: Path) -> None:
    assert "quantize" in run(installed / "qoq", "--help", cwd=tmp_path).stdout
    assert "qoq-g128" in run(installed / "qoq", "recipes", cwd=tmp_path).stdout


def test_quantize_tiny_from_another_folder(installed: Path, tmp_path: Path) -> None:
    run(installed / "qoq", "quantize", "tiny", "--recipe", "rtn-g128", "-o", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "qoq_manifest.json").exists()
    assert list((tmp_path / "out").glob("*.safetensors"))
