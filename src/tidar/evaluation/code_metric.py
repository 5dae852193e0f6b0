"""The metric `code_eval` in the sandbox: stands where the harness would run a model's programs unprotected."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import comb
from typing import Any

from tidar.evaluation.sandbox import Outcome, Sandbox

_current: list[Sandbox] = []
"""The sandbox that task files use, while `sandboxed` lasts: the harness calls them with rows and texts only."""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` texts passes, drawn from `samples` of which `passed` do (arXiv 2107.03374)."""
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


class CodeEval:
    """`compute` as `evaluate.load("code_eval")` has it; every program runs in the sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
        **_: object,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over tasks, and how each program ended.

        references: the test of each task; predictions: the candidates of each task. A k above the number of
        candidates is left out, as upstream.
        """
        results: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for task, (test, candidates) in enumerate(zip(references, predictions, strict=True)):
            for number, candidate in enumerate(candidates):
                outcome = self.sandbox.run(f"{candidate}\n{test}")
                results[task].append((number, _told(task, number, outcome)))
        counts = [(len(each), sum(r["passed"] for _, r in each)) for each in results.values()]
        fewest = min(samples for samples, _ in counts)
        scores = {
            f"pass@{each}": sum(pass_at_k(*count, each) for count in counts) / len(counts)
            for each in k
            if each <= fewest
        }
        return scores, results


def _told(task: int, number: int, outcome: Outcome) -> dict[str, Any]:
    result = "passed" if outcome.passed else f"{outcome.verdict}: {outcome.detail}"
    return {
        "task_id": task,
        "passed": outcome.passed,
        "result": result,
        "completion_id": number,
    }


@contextlib.contextmanager
def sandboxed(sandbox: Sandbox) -> Iterator[None]:
    """While this lasts, `evaluate.load("code_eval")` is the metric above, and task files run programs in `sandbox`.

    The harness's task files (humaneval, mbpp) load the metric when they are imported, and keep it.
    """
    import evaluate

    original = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval(sandbox) if path == "code_eval" else original(path, *args, **kwargs)

    evaluate.load = load
    _current.append(sandbox)
    try:
        yield
    finally:
        _current.pop()
        evaluate.load = original


def score_program(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of HumanEval answers; named in `tasks/humaneval_local.yaml`, called by the harness."""
    test = f"{doc['test']}\ncheck({doc['entry_point']})"
    answers = results[0] if isinstance(results[0], list) else results
    candidates = [[doc["prompt"] + answer for answer in answers]]
    scores, _ = CodeEval(_current[-1]).compute(references=[test], predictions=candidates)
    return scores
