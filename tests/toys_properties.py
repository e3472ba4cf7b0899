"""What the property tests share: counting what is tried, and telling our errors from others'."""

from __future__ import annotations

import dis
from collections import Counter
from pathlib import Path

import hypothesis

ROOT = Path(__file__).resolve().parent.parent
_NOT_OURS = {".venv", "tests", "build"}

#: What our code raises where something was asked that cannot be done.
KINDS = (ValueError, TypeError, KeyError, FloatingPointError, RuntimeError, OSError)


def clear(error: BaseException) -> str:
    """'' for one clear error of ours, else what is wrong with it.

    Ours: the last frame of the traceback lies in the repository, on a `raise`, so that nothing of
    torch, NumPy or SciPy and no failed look-up speaks to the user; clear: it says a sentence.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    code = last.tb_frame.f_code
    path = Path(code.co_filename)
    where = f"{path.name}:{last.tb_lineno}: {type(error).__name__}: {error}"
    ours = path.is_relative_to(ROOT) and not _NOT_OURS & set(path.relative_to(ROOT).parts)
    raised = dis.opname[code.co_code[last.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    if not isinstance(error, KINDS) or not ours or not raised:
        return f"not an error of ours: {where}"
    if len(str(error)) < 20:
        return f"says too little: {where}"
    return ""


class Cases:
    """Counts what a test tries; `failures` holds what neither ran nor was refused clearly."""

    def __init__(self):
        self.count, self.ran, self.refused = 0, 0, 0
        self.failures: list[str] = []
        self.said = ""  # by the last error that `refuse` met
        self.reasons: Counter[str] = Counter()

    def attempt(self, label, function, check=None):
        """Call `function()`. It either gives what `check` accepts (check(result) -> '' or what is
        wrong), or raises one clear error; returns the result or None."""
        self.count += 1
        try:
            result = function()
        except Exception as error:
            if wrong := clear(error):
                self.failures.append(f"{label}: {wrong}")
            self.refused += 1
            self.reasons[str(error)[:50]] += 1
            return None
        self.ran += 1
        if check is not None and (wrong := check(result)):
            self.failures.append(f"{label}: {wrong}")
        return result

    def refuse(self, label, function, *words: str):
        """Call `function()`, which must raise one clear error that says all of `words`."""
        self.count, self.said = self.count + 1, ""
        try:
            result = function()
        except Exception as error:
            self.said = str(error)
            missing = [word for word in words if word not in str(error)]
            if wrong := clear(error) or (f"does not say {missing}: {error}" if missing else ""):
                self.failures.append(f"{label}: {wrong}")
            self.refused += 1
            return
        self.failures.append(f"{label}: accepted, gave {str(result)[:80]}")

    def attempt_naming(self, label, name: str, function, check=None):
        """As `attempt`, and the error says `name`."""
        refused, count = self.refused, len(self.failures)
        kept: list[str] = []

        def noted():
            try:
                return function()
            except Exception as error:
                kept.append(str(error))
                raise

        result = self.attempt(label, noted, check)
        if self.refused > refused and len(self.failures) == count and name not in kept[0]:
            self.failures.append(f"{label}: does not name {name}: {kept[0][:200]}")
        return result

    def hold(self, label, good) -> None:
        """Count a claim; a false one is a failure."""
        self.count += 1
        if not good:
            self.failures.append(f"{label}: does not hold")

    def done(self, at_least: int) -> None:
        """Fail with the first failures, or where fewer cases were tried than claimed."""
        shown = "\n".join(self.failures[:40])
        assert not self.failures, f"{len(self.failures)} of {self.count} cases:\n{shown}"
        assert self.count >= at_least, f"{self.count} cases, fewer than {at_least}"


def examples(n: int):
    """Hypothesis, the same `n` examples every time, with nothing written to disk."""
    return hypothesis.settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
