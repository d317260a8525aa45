"""What pyproject.toml, the Dockerfile and the CI files say must be what is on disk.

A sub-package that is missing from the list works in an editable install and is absent from the wheel; a module named
`kernels` breaks transformers. Both go unnoticed until a user meets them, so they are tests.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
ROOMS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def python_folders(package: str, folder: Path) -> dict[str, Path]:
    """The import name of every folder under `folder` that holds Python files."""
    modules = (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    return {".".join((package, *path.parent.relative_to(folder).parts)): path.parent for path in modules}


ON_DISK = {name: path for room, folder in ROOMS.items() for name, path in python_folders(room, folder).items()}


def test_the_five_rooms_are_mapped() -> None:
    assert {name: path.name for name, path in ROOMS.items()} == {
        "qoq_cli": "qoq_cli",
        "qoq.calib": "calib",
        "qoq.formats": "formats",
        "qoq.kernels": "kernels",
        "qoq.recipes": "recipes",
    }


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    listed = SETUPTOOLS["packages"]
    assert sorted(listed) == sorted(ON_DISK)


def test_every_package_but_kernels_is_a_regular_one() -> None:
    without_init = {name for name, folder in ON_DISK.items() if not (folder / "__init__.py").exists()}
    assert without_init == {"qoq.kernels"}


def test_no_init_file_in_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_room_is_typed() -> None:
    assert [name for name, folder in ROOMS.items() if not (folder / "py.typed").exists()] == []


def test_every_data_file_is_shipped() -> None:
    patterns: dict[str, list[str]] = SETUPTOOLS["package-data"]
    shipped = {
        path
        for package, folder in ON_DISK.items()
        for pattern in patterns["*"] + patterns.get(package, [])
        for path in folder.glob(pattern)
    }
    data = {
        path
        for folder in ROOMS.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".md"}
    }
    forgotten = sorted(str(path.relative_to(ROOT)) for path in data - shipped)
    assert not forgotten, f"add them to [tool.setuptools.package-data]: {forgotten}"


@pytest.mark.parametrize("safe_path", [True, False], ids=["safe-path", "from-the-repository"])
def test_a_bare_import_of_kernels_is_not_ours(safe_path: bool) -> None:
    """With the repository root on sys.path, `kernels` may at most be seen as a folder without code of its own."""
    probe = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    found = subprocess.run(
        [sys.executable, *(["-P"] if safe_path else []), "-c", probe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert found == "None" or not Path(found).is_relative_to(ROOT / "kernels")


def test_the_version_is_a_literal_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "qoq_cli.__version__"}
    tree = ast.parse((ROOT / "qoq_cli" / "__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert len(values) == 1
    assert isinstance(values[0], ast.Constant), "setuptools reads the version without importing; keep it a literal"
    assert importlib.metadata.version("qoq") == values[0].value, "run `make setup` after changing the version"


CONSTRAINTS = {
    "constraints.txt": (),
    "constraints-lm-eval.txt": ("lm-eval", "longbench"),
    "constraints-vllm.txt": ("vllm",),
}
"""Which extras are pinned in a file of their own, because they cannot be installed with the rest of the pinned set."""


def pinned(name: str) -> dict[str, Version]:
    pins = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.]+)", line)
            assert match, f"{name}: not a plain pin: {line!r}"
            pins[canonicalize_name(match[1])] = Version(match[2])
    return pins


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_pin_every_dependency_within_its_range(file: str) -> None:
    pins = pinned(file)
    apart = {extra for extras in CONSTRAINTS.values() for extra in extras} - set(CONSTRAINTS[file])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [entry for extra, entries in extras.items() if extra not in apart for entry in entries]
    for text in [*PROJECT["project"]["dependencies"], *optional]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{file} does not pin {name}"
        assert pins[name] in requirement.specifier, f"{name}: {pins[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize(
    ("file", "different"),
    [
        ("constraints-lm-eval.txt", {"python-dateutil"}),
        ("constraints-vllm.txt", {"compressed-tensors", "numpy", "setuptools", "torch"}),
    ],
)
def test_the_pins_of_an_extra_are_the_others_and_more(file: str, different: set[str]) -> None:
    pins, more = pinned("constraints.txt"), pinned(file)
    assert {name for name, version in pins.items() if more.get(name) != version} == different


def test_vllm_finds_the_plug_in() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="qoq")
    assert entry.value == "qoq.kernels.vllm.plugin:register"
    assert callable(entry.load()), "it loads without vLLM: only the call needs it"


def test_the_image_installs_the_pinned_set() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install.*", dockerfile)
    assert installs
    assert [line for line in installs if "-c constraints.txt" not in line] == []


def test_continuous_integration_only_calls_make() -> None:
    steps = re.findall(r"^\s*(?:- )?run: (.*)$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)
    assert steps
    script = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make check test kernels"]
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in [*steps, *(line.removeprefix("exec ") for line in commands)]:
        make, *words = command.split()
        assert make == "make"
        assert {word for word in words if "=" not in word} <= targets


def test_make_without_a_target_lists_the_targets() -> None:
    listing = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in listing.splitlines() if line.strip()}
    assert {
        "help",
        "setup",
        "demo",
        "test",
        "test-slow",
        "test-gpu",
        "kernels",
        "check",
        "fmt",
        "wheel",
        "clean",
    } <= listed
