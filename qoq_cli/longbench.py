"""LongBench (https://github.com/THUDM/LongBench), as lm-eval has it: long prompts, where the cost of a KV cache shows.

lm-eval owns prompts, answers and metrics. Here are the names, the average over the tasks, and local data.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq_cli.harness_tasks import Suite, close_names, load_tasks, require_lm_eval

DEFAULT: Final = ("qasper", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Those of KIVI's script for LongBench (https://github.com/jy-yuan/KIVI, pred_long_bench.py)."""
_OPTION = "--longbench"
_PREFIX = "longbench_"
_AVERAGE = "longbench (mean)"
_PACKAGES = ("jieba", "fuzzywuzzy", "rouge")


def longbench_suite(what: str) -> Suite:
    """`default`, `all` (21 tasks), `e` (13, uniform in length), tasks by name, or a folder with one file a task.

    The folder holds LongBench's own files (`qasper.jsonl`, ...), or a folder of .parquet files for each task, and all
    that is in it is evaluated. Raises InputError for what is not known, EnvironmentProblem when lm-eval, a package or
    the data is missing.
    """
    version = require_lm_eval(_OPTION)
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise EnvironmentProblem(
            f"{_OPTION} needs {', '.join(missing)}, which lm-eval's LongBench metrics import",
            remedy="pip install 'qoq[longbench]'",
        )
    known = _known_tasks()
    folder = Path(what).expanduser()
    if folder.is_dir():
        members = _local_tasks(folder, known)
    else:
        members = [{"task": _PREFIX + name} for name in _names(what, known)]
    return Suite(
        "LongBench",
        version,
        _load(members, what),
        shown="score",
        keeps_both_ends=True,
        beside_kv16=True,
        batch_size=1,
    )


def rename_question(documents: Any) -> Any:
    """LongBench's own files call `input` what lm-eval's prompts call `question`."""
    columns = documents.column_names
    return (
        documents.rename_column("input", "question") if "input" in columns and "question" not in columns else documents
    )


def _task_files() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / "longbench"


def _known_tasks() -> list[str]:
    """Names of lm-eval's LongBench tasks, without their prefix."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(_task_files()), include_defaults=False)
    return [name.removeprefix(_PREFIX) for name in manager.all_subtasks]


def _names(what: str, known: Sequence[str]) -> list[str]:
    sets = {
        "default": DEFAULT,
        "all": [name for name in known if not name.endswith("_e")],
        "e": [name for name in known if name.endswith("_e")],
    }
    names: list[str] = []
    for part in filter(None, (part.strip() for part in what.split(","))):
        chosen: Iterable[str] = sets.get(part, [part.removeprefix(_PREFIX)])
        names += chosen
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"{_OPTION} {what}: neither a folder nor LongBench tasks"
            + (f" (not known: {', '.join(unknown)})" if unknown else ""),
            remedy=(close_names(unknown[0], known) if unknown else "")
            + f"use default, all, e, names from {', '.join(sets['all'])}, or a folder with their files",
        )
    return list(dict.fromkeys(names))


def _local_tasks(folder: Path, known: Sequence[str]) -> list[dict[str, Any]]:
    members: list[dict[str, Any]] = []
    for name in known:
        lines, tables = folder / f"{name}.jsonl", sorted(folder.glob(f"{name}/*.parquet"))
        files = [lines] if lines.is_file() else tables
        if files:
            members.append(
                {
                    "task": _PREFIX + name,
                    "dataset_path": "json" if lines.is_file() else "parquet",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": {"test": [str(path.resolve()) for path in files]}},
                }
            )
    if not members:
        raise InputError(
            f"{_OPTION} {folder}: no data of a LongBench task",
            remedy="unpack data.zip of LongBench there (qasper.jsonl, hotpotqa.jsonl, ...), and give the folder with "
            "these files",
        )
    return members


def _load(members: Sequence[dict[str, Any]], given: str) -> dict[str, Any]:
    """Load the tasks as one group, whose score is the mean of theirs; a group of lm-eval is a file."""
    import yaml
    from lm_eval.tasks import TaskManager

    group = {
        "group": _AVERAGE,
        "task": list(members),
        "aggregate_metric_list": [{"metric": "score", "weight_by_size": False}],
        "metadata": {"version": 0},
    }
    # Whatever else stands in the file of a group goes to its tasks.
    to_all = f"process_docs: !function {rename_question.__module__}.{rename_question.__name__}\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "group.yaml").write_text(yaml.safe_dump(group, sort_keys=False) + to_all, encoding="utf-8")
        manager = TaskManager(include_path=[str(_task_files()), folder], include_defaults=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="fuzzywuzzy")  # that it could be faster
            return load_tasks(manager, [_AVERAGE], option=_OPTION, given=given)
