"""What the bench's two processes say to each other. Imports no torch: the parent asks, and never touches the
device."""

from dataclasses import asdict, dataclass, field

DONE, REFUSED = "done", "refused"
# What a later run does not try again: a wrong output, an exception, silence, an end without an answer.
WRONG, FAILED, HANGS, DIED = "wrong", "failed", "hangs", "died"
FAULTS = (WRONG, FAILED, HANGS, DIED)
BEGUN, CUT = "begun", "cut"  # not answered yet, and not answered when the time for all was over


class Refused(Exception):
    """What does not exist here; the text is the reason."""


class Wrong(Exception):
    """A wrong output: the text says how far off, `result` holds the figures."""

    def __init__(self, reason: str, result=None):
        super().__init__(reason)
        self.result = result


@dataclass(frozen=True)
class Case:
    """One thing to measure. kind: the task that does it, with `given`; what comes first matters most.

    seconds: what it is expected to take; it is not begun with less left. limit_s: the longest silence.
    needs: the case without whose result this one makes no sense. group: the results of the group's cases that
    are done are handed to the task. fresh: in a process of its own. interpret: in Triton's interpreter.
    """

    id: str
    kind: str
    given: dict = field(default_factory=dict)
    seconds: float = 2.0
    limit_s: float = 60.0
    needs: str = ""
    group: str = ""
    fresh: bool = False
    interpret: bool = False

    def to_json(self) -> dict:
        return asdict(self)
