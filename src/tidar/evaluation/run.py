"""A run of `tidar eval`: tasks by methods, each as lm-evaluation-harness asks and scores it."""

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api import task as harness_task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from tidar.api import EngineName, LanguageModel
from tidar.decode.spec import MethodSpec
from tidar.errors import TidarError
from tidar.evaluation.bound import SAMPLES
from tidar.evaluation.code_metric import sandboxed
from tidar.evaluation.harness import Progress, Silent, Text, TidarLM
from tidar.evaluation.local_data import KINDS, TASKS, Files, find_files
from tidar.evaluation.presets import GIVEN, PRESETS, Preset, preset
from tidar.evaluation.sandbox import Sandbox

RANDOM_SEED, FEWSHOT_SEED = 0, 1234
"""The harness's own, so that examples and shuffles are those of everyone else's runs."""

IN_SANDBOX = ("humaneval", "mbpp")
"""Families of tasks that run programs through the metric `code_eval`, which the sandbox stands in for."""

BOOTSTRAP = 1000
"""Draws for the standard error of metrics that have no formula for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What shall be evaluated, and how. None: the preset's, or the task's own.

    paper: take shots and lengths from `presets.PRESETS`; else the harness's. mc_samples: of each text, for likelihoods
    of diffusion methods. samples: keep prompts and answers.
    """

    tasks: tuple[str, ...]
    methods: tuple[MethodSpec, ...]
    data: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    max_gen_toks: int | None = None
    paper: bool = True
    temperature: float | None = None
    seed: int = 0
    batch: int = 8
    mc_samples: int = SAMPLES
    engine: EngineName = "auto"
    chat_template: bool = False
    allow_weak_sandbox: bool = False
    samples: bool = False

    def preset(self, task: str) -> Preset:
        """Shots and length of a task, and whose they are."""
        known = preset(task) if self.paper or task in KINDS else Preset()
        if self.shots is None and self.max_gen_toks is None:
            return known
        shots = known.shots if self.shots is None else self.shots
        length = known.max_gen_toks if self.max_gen_toks is None else self.max_gen_toks
        return Preset(shots, length, GIVEN)


@dataclass(slots=True)
class Results:
    """Mutable: grows task by task, so that what is finished is kept when a run is interrupted."""

    tasks: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    sandbox: dict[str, Any] | None = None
    interrupted: bool = False


Repetition = Callable[[Sequence[Sequence[int]]], float | None]
"""How repetitive texts are, from their tokens: loops are easy to draft, so T/NFE is never shown without it."""


def run_tasks(
    model: LanguageModel,
    asked: Asked,
    progress: Progress | None = None,
    repetition: Repetition = lambda texts: None,
) -> Results:
    """Runs all tasks. repetition: measures the generated texts, as `distinct_4` of the figures. Raises
    TidarError for impossible tasks, before the first is run as far as that can be told."""
    if not asked.tasks:
        raise TidarError("No task was named.")
    files = find_files(asked.tasks, asked.data)
    remote = [name for name in asked.tasks if name not in KINDS]
    manager = _manager(remote)
    runners = {
        spec.name: TidarLM(
            model, spec.name, batch_size=asked.batch, engine=asked.engine, seed=asked.seed,
            temperature=asked.temperature, mc_samples=asked.mc_samples, progress=progress or Silent(),
        )
        for spec in asked.methods
    }  # fmt: skip
    results = Results()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            if any(name.startswith(IN_SANDBOX) for name in asked.tasks):
                sandbox = Sandbox(allow_weak=asked.allow_weak_sandbox)
                stack.enter_context(sandboxed(sandbox))
                results.sandbox = sandbox.to_json()
            for name in asked.tasks:
                _run_task(name, asked, manager, files.get(name), runners, results, repetition)
    except KeyboardInterrupt:
        results.interrupted = True
    return results


def _manager(names: Sequence[str]) -> TaskManager | None:
    """The harness's index of tasks, which takes seconds to make; None where nothing is needed of it."""
    if not names:
        return None
    with _quiet():
        manager = TaskManager()
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise TidarError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}. Known here: {', '.join(PRESETS)}, and every "
            "other name of `lm_eval ls tasks`."
        )
    return manager


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's log and its own progress bars are left out while this lasts."""
    logger, bar = logging.getLogger("lm_eval"), harness_task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    harness_task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(level)
        harness_task.tqdm = bar


def _run_task(
    name: str,
    asked: Asked,
    manager: TaskManager | None,
    files: Files | None,
    runners: dict[str, TidarLM],
    results: Results,
    repetition: Repetition,
) -> None:
    """One task by each method; if nothing is generated, by each way that the methods give likelihoods."""
    wanted = asked.preset(name)
    loaded = _load(name, manager, files)
    _configure(name, loaded["tasks"], wanted, files)
    generates = any(t.get_config("output_type") == "generate_until" for t in loaded["tasks"].values())  # fmt: skip
    told: dict[str, Any] = {}
    texts: dict[str, list[Text]] = {}
    for method, lm in runners.items():
        label = method if generates else lm.likelihood
        if label in told:  # another method with the same likelihoods
            continue
        lm.start()
        began = time.perf_counter()
        found = _evaluate(lm, loaded, asked)
        told[label] = {
            "scores": _scores(found),
            "generation": _cost(lm, repetition),
            "likelihood": lm.scored.to_json() if lm.scored.requests else None,
            "seconds": time.perf_counter() - began,
        }
        if lm.spec.is_exact:
            texts[method] = lm.texts
        results.samples += _samples(found, name, label)
    for method, figures in told.items():
        if "ar" in texts and method in texts:
            figures["texts_other_than_ar"] = sum(
                one.ids != other.ids for one, other in zip(texts["ar"], texts[method], strict=True)
            )
    top = found.get("groups") or {}
    results.tasks[name] = {
        "settings": {
            "from": wanted.source,
            "shots": dict(found["n-shot"]),
            "max_gen_toks": wanted.max_gen_toks,
            "generation": _generation(loaded["tasks"]) if generates else None,
            "file": str(files.test) if files else None,
            "version": dict(found["versions"]),
        },
        "examples": sum(count["effective"] for count in found["n-samples"].values()),
        "headline": [name] if name in found["results"] else list(top or found["results"]),
        "methods": told,
    }


def _cost(lm: TidarLM, repetition: Repetition) -> dict[str, Any] | None:
    """What generation took, and how repetitive its texts are; None where nothing was generated."""
    if not lm.generated.requests:
        return None
    return {**lm.generated.to_json(), "distinct_4": repetition([text.ids for text in lm.texts])}


def _load(name: str, manager: TaskManager | None, files: Files | None) -> dict[str, Any]:
    """The task's objects. Raises TidarError where its data cannot be had."""
    try:
        if files is None:
            assert manager is not None
            loaded: dict[str, Any] = manager.load([name])
        else:
            where = {"test": str(files.test), "train": str(files.train) if files.train else None}
            local = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=where)
            loaded = local.load([name])
    except ImportError as error:
        raise TidarError(f"task {name} needs another package: {error}") from error
    except OSError as error:  # no network, no such data set, no such file
        raise TidarError(f"the data of task {name} cannot be loaded: {error}") from error
    for each, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not each.startswith(IN_SANDBOX):
            raise TidarError(f"task {each} runs programs outside our sandbox; it is not offered.")
    return loaded


def _configure(name: str, tasks: dict[str, Any], wanted: Preset, files: Files | None) -> None:
    """Sets shots and lengths as the harness's own command does. Raises TidarError where there are no examples."""
    shots = wanted.shots
    if files is not None and shots and files.train is None:
        if not KINDS[name].train:
            raise TidarError(f"{name} has no examples to put into prompts; --shots must be 0.")
        raise TidarError(
            f"{name} takes its {shots} examples from a file train.jsonl[.gz|.xz] beside {files.test.name}, which is "
            "not there; add it, or --shots 0."
        )
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        # A task that says 0 itself is never given examples: the harness's rule.
        if shots is not None and own != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        if wanted.max_gen_toks and task.get_config("output_type") == "generate_until":
            length = {"max_gen_toks": wanted.max_gen_toks}
            task.set_config(key="generation_kwargs", value=length, update=True)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _evaluate(lm: TidarLM, loaded: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The harness's own results of one method."""
    random.seed(RANDOM_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    found = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=asked.limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=asked.samples,
        apply_chat_template=asked.chat_template,
        fewshot_as_multiturn=asked.chat_template,
        confirm_run_unsafe_code=True,  # `_load` lets through only what runs in the sandbox
    )
    assert found is not None
    return dict(found)


def _scores(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of every subtask and group: {"task", "metric", "filter", "value", "stderr", "higher_is_better"}."""
    rows = []
    for task, figures in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": None if chosen == "none" else chosen,
                    "value": _number(value),
                    "stderr": _number(error),
                    "higher_is_better": better.get(metric),
                }
            )
    return rows


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float | np.number):
        return None
    return float(value) if np.isfinite(value) else None


def _generation(tasks: dict[str, Any]) -> dict[str, Any]:
    """Generation options as the tasks have them now."""
    return {name: dict(task.get_config("generation_kwargs") or {}) for name, task in tasks.items()}


def _samples(found: dict[str, Any], task: str, method: str) -> Iterator[dict[str, Any]]:
    """What was asked and answered, as the harness notes it."""
    for subtask, rows in (found.get("samples") or {}).items():
        for row in rows:
            yield {"asked": task, "task": subtask, "method": method, **row}
