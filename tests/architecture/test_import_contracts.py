"""The direction `recipes <- formats <- { calib | kernels } <- qoq_cli`, as written in pyproject.toml.

import-linter reads the sources through a tree of links with the installed names, as `make contracts` does, because it
cannot follow the import hook of an editable install. A second test breaks every rule in a toy tree, so that a contract
that stopped looking would be noticed.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("calib", "formats", "kernels", "recipes")
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

VIOLATIONS = {
    "qoq/recipes/uses_formats.py": "from qoq.formats import grid\n",
    "qoq/recipes/uses_torch.py": "import torch\n",
    "qoq/recipes/uses_numpy.py": "import numpy\n",
    "qoq/formats/uses_calib.py": "from qoq.calib import stage\n",
    "qoq/formats/uses_kernels.py": "def late():\n    from qoq.kernels import gemm\n",
    "qoq/calib/uses_kernels.py": "from qoq.kernels import gemm\n",
    "qoq/kernels/uses_calib.py": "from qoq.calib import stage\n",
    "qoq/kernels/uses_cli.py": "import qoq_cli.app\n",
    "qoq/kernels/uses_plugin.py": "from qoq.kernels.vllm import plugin\n",
}
LEGAL = {
    "qoq/recipes/__init__.py": "",
    "qoq/recipes/schema.py": "",
    "qoq/formats/__init__.py": "",
    "qoq/formats/grid.py": "import torch\nfrom qoq.recipes import schema\n",
    "qoq/calib/__init__.py": "",
    "qoq/calib/stage.py": "from qoq.formats import grid\nfrom qoq.recipes import schema\n",
    "qoq/kernels/gemm.py": "from qoq.formats import grid\n",
    "qoq/kernels/vllm/__init__.py": "",
    "qoq/kernels/vllm/plugin.py": "from qoq.kernels import gemm\nfrom qoq.kernels.vllm import linear\n",
    "qoq/kernels/vllm/linear.py": "",
    "qoq_cli/__init__.py": "",
    "qoq_cli/app.py": "from qoq.calib import stage\nfrom qoq.kernels import gemm\n",
}


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of pyproject.toml on the packages under `tree`."""
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [linter, "--no-logo", "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def write_tree(tree: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_rooms_import_in_one_direction(tmp_path: Path) -> None:
    (tmp_path / "qoq").mkdir()
    for room in ROOMS:
        (tmp_path / "qoq" / room).symlink_to(ROOT / room)
    (tmp_path / "qoq_cli").symlink_to(ROOT / "qoq_cli")
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_legal_imports_pass(tmp_path: Path) -> None:
    write_tree(tmp_path, LEGAL)
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_wrong_direction_is_reported(tmp_path: Path) -> None:
    write_tree(tmp_path, LEGAL | VIOLATIONS)
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    unreported = [name for name in VIOLATIONS if name.removesuffix(".py").replace("/", ".") not in result.stdout]
    assert not unreported, result.stdout


def test_every_room_is_under_a_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(project["importlinter"]["root_packages"]) == set(project["setuptools"]["package-dir"])


def test_no_module_has_a_name_that_says_nothing() -> None:
    modules = (path for room in (*ROOMS, "qoq_cli") for path in (ROOT / room).rglob("*.py"))
    vague = [path for path in modules if VAGUE_NAMES & {path.stem, path.parent.name}]
    assert not vague, "name a module after what it owns"
