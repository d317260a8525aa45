"""Which tasks of EleutherAI's lm-eval ("LM evaluation harness") to run: found, checked and loaded before any model.

lm-eval is an optional package, so it is imported inside functions; `require_lm_eval` says so where it is missing.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from qoq.recipes.errors import EnvironmentProblem, InputError

OLDEST: Final = "0.4.13"
INSTALL: Final = "pip install 'qoq[lm-eval]'"
_FILE_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml", "webdataset")
_PROBE_SECONDS = 10


@dataclass(frozen=True)
class Suite:
    """Tasks that were loaded, data and all, and how they are run.

    title           what is being evaluated, for progress and tables
    version         of lm-eval
    loaded          what lm-eval's TaskManager gives: tasks and groups by name
    shown           the only metric that the table shows, or None for all
    keeps_both_ends prompts that are too long lose tokens in their middle; otherwise at their beginning
    beside_kv16     every model but the baseline whose cache has fewer bits is run once more with a 16-bit one
    batch_size      requests that run at once, unless the user says so
    """

    title: str
    version: str
    loaded: Mapping[str, Any]
    shown: str | None = None
    keeps_both_ends: bool = False
    beside_kv16: bool = False
    batch_size: int = 8

    def longest_answer(self) -> tuple[int, str]:
        """Tokens that a task lets the model write at most, and the name of that task; (0, "") when none writes."""
        from lm_eval.models.utils import normalize_gen_kwargs

        answers = [
            (int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]), str(name))
            for name, task in self.loaded["tasks"].items()
            if task.get_config("output_type") == "generate_until"
        ]
        return max(answers, default=(0, ""))


def require_lm_eval(option: str) -> str:
    """The version of lm-eval that is installed. Raises EnvironmentProblem for none, or for one that is too old."""
    from packaging.version import Version

    try:
        import lm_eval
    except ImportError as error:
        raise EnvironmentProblem(f"{option} needs lm-eval, which is not installed", remedy=INSTALL) from error
    version: str = lm_eval.__version__
    if Version(version) < Version(OLDEST):
        raise EnvironmentProblem(f"{option} needs lm-eval {OLDEST} or newer, found {version}", remedy=INSTALL)
    # lm-eval warns about what we do on purpose, such as handing it a model that is loaded already; `datasets` logs the
    # errors that it raises as well.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    return version


def named_suite(names: Sequence[str], *, folder: Path | None, num_fewshot: int | None) -> Suite:
    """Tasks, groups, tags or patterns with `*`, found in `folder` (YAML files) or among lm-eval's own.

    Raises InputError for unknown names and tasks that cannot be run, EnvironmentProblem when lm-eval or the data is
    missing.
    """
    version = require_lm_eval("--tasks")
    from lm_eval.tasks import TaskManager

    manager = None
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if not manager.all_tasks:
            raise InputError(
                f"--task-path {folder}: no task in it",
                remedy="give a folder with lm-eval's task files (.yaml, with `task:` and `dataset_path:`)",
            )
    local = list(manager.all_tasks) if manager is not None else []
    # lm-eval's own list takes many seconds to read, and a folder that holds everything does without.
    if manager is None or not _holds_all(manager, names):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    wanted = _match(names, manager.all_tasks, version, local)
    loaded = load_tasks(manager, wanted, option="--tasks", given=",".join(names), num_fewshot=num_fewshot)
    return Suite("tasks", version, loaded)


def load_tasks(
    manager: Any, names: Sequence[str], *, option: str, given: str, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Load tasks and their data, and give them `num_fewshot` examples, save those that are written for none.

    `given` is what the user wrote after `option`, for messages.
    Raises InputError for tasks that cannot be run, EnvironmentProblem when their data or a package is missing.
    """
    from jinja2 import TemplateError

    configs = [config for name in names for config in _configs(manager.task_index, name)]
    hub = list(dict.fromkeys(path for config in configs if (path := _hub_dataset(config)) is not None))
    for dataset in hub:
        _check_reachable(dataset, option)
    try:
        loaded = cast(dict[str, Any], manager.load(list(names)))
    except ImportError as error:
        raise EnvironmentProblem(
            f"{option}: a package that these tasks need is not installed: {_first_line(error)}",
            remedy="install it; for a set of tasks lm-eval may have an extra: pip install 'lm-eval[NAME]'",
        ) from error
    except _data_errors() as error:
        if hub and not _is_about_files(error):
            raise _unreachable(", ".join(hub[:3]), option, error) from error
        raise InputError(
            f"{option} {given}: the data cannot be read: {_first_line(error.__cause__ or error)}",
            remedy="check the files, and what a task's YAML says in dataset_path and data_files: relative paths there "
            "start at the current folder",
        ) from error
    except (AttributeError, LookupError, RuntimeError, TemplateError, TypeError, ValueError) as error:
        if str(error).startswith("Couldn't find cache"):  # how `datasets` says that it is offline
            raise _unreachable(", ".join(hub[:3]), option, error) from error
        raise InputError(
            f"{option} {given}: lm-eval cannot load this: {_first_line(error)}",
            remedy="name each task once, and check the YAML files with `lm_eval validate --tasks NAME`",
        ) from error
    for name, task in loaded["tasks"].items():
        _check_runnable(name, task, option)
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def close_names(name: str, known: Iterable[str]) -> str:
    """A question about names like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.7)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _match(names: Sequence[str], known: Sequence[str], version: str, local: Sequence[str]) -> list[str]:
    found = {name: fnmatch.filter(known, name) for name in names}
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        hint = close_names(unknown[0], known)
        if local and not hint:
            hint = f"--task-path has {', '.join(local[:5])}{', ...' if len(local) > 5 else ''}; "
        raise InputError(
            f"--tasks: lm-eval {version} does not know {', '.join(unknown)}",
            remedy=f"{hint}`lm_eval ls tasks` lists its own, --task-path FOLDER adds yours",
        )
    return list(dict.fromkeys(match for matches in found.values() for match in matches))


def _holds_all(manager: Any, names: Sequence[str]) -> bool:
    """Whether the names, and all that their groups are made of, are among the manager's own."""
    found = [match for name in names for match in fnmatch.filter(manager.all_tasks, name) or [name]]
    return all(config for name in found for config in _configs(manager.task_index, name))


def _configs(index: Mapping[str, Any], member: str | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Configurations of the tasks that a name, or an entry of a group, stands for; an empty one for an unknown name."""
    if isinstance(member, str):
        entry = index.get(member)
        if entry is None:
            yield {}
            return
        own = entry.cfg or {}
        parts = sorted(entry.tags) if entry.kind.name == "TAG" else own.get("task")
    else:
        own, parts = member, member.get("task") or member.get("group")
    if isinstance(parts, list):
        for part in parts:
            yield from _configs(index, part)
    elif isinstance(member, dict) and isinstance(parts, str) and parts in index:
        for config in _configs(index, parts):
            yield {**config, **own}
    else:
        yield own


def _hub_dataset(config: Mapping[str, Any]) -> str | None:
    """The data set on the Hugging Face hub that a task reads, if it reads one."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or path in _FILE_FORMATS or "custom_dataset" in config or Path(path).exists():
        return None
    return path


def _check_reachable(dataset: str, option: str) -> None:
    """Ask the hub once: without a network, `datasets` retries for half a minute before it says so."""
    import datasets
    from huggingface_hub import HfApi, constants

    owner, _, name = dataset.rpartition("/")
    prefix = f"{owner}___" if owner else ""
    cached = [prefix + name, prefix + datasets.naming.camelcase_to_snakecase(name)]
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    if constants.HF_HUB_OFFLINE or any((folder / entry).is_dir() for entry in cached):
        return  # offline, `datasets` looks into its cache at once
    try:
        HfApi().dataset_info(dataset, timeout=_PROBE_SECONDS)
    except _data_errors() as error:
        raise _unreachable(dataset, option, error) from error


def _unreachable(dataset: str, option: str, error: Exception) -> EnvironmentProblem:
    local = "--longbench FOLDER" if option == "--longbench" else "--task-path FOLDER"
    return EnvironmentProblem(
        f"{option}: the data set {dataset} is not in the local cache and could not be had from the hub "
        f"({_first_line(error)})",
        remedy="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a gated set needs HF_TOKEN; or copy the cache "
        f"(HF_HOME) from a machine that has it; or use local data with {local}",
    )


def _data_errors() -> tuple[type[Exception], ...]:
    """What is raised when data cannot be had."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub 1 raises the errors of httpx, version 2 those of httpx2; its own derive from the right ones.
    return OSError, cast("type[Exception]", HfHubHTTPError.__bases__[0]), datasets.exceptions.DatasetsError


def _is_about_files(error: Exception) -> bool:
    """Whether a local file is what is missing, and not a data set on the hub."""
    import datasets

    return isinstance(error, FileNotFoundError) and not isinstance(error, datasets.exceptions.DatasetNotFoundError)


def _check_runnable(name: str, task: Any, option: str) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"{option}: {name} executes what the model writes, and qoq does not run that",
            remedy="leave it out, or run it with lm-eval in a sandbox: the checkpoint loads after `import "
            "qoq.kernels.hf`",
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{option}: {name} needs more than text", remedy="leave it out")


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
