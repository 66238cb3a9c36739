"""How many steps went which way, and what reading shared pages once has saved: counters, and a line in the log now and then."""

import dataclasses
import os

#: Steps between two lines in the log; 0 writes none.
LOG_EVERY = int(os.environ.get("PREFIX_ATTN_LOG_STEPS", "2000"))
#: A plan's bytes are summed up every so many steps: a summary costs more than a plan.
SAMPLE_EVERY = 64


@dataclasses.dataclass
class StepMetrics:
    """Counters of one metadata builder: one KV cache group of one worker process."""

    #: Steps whose rows all ran on a plan.
    decode_steps: int = 0
    #: Steps whose decode rows ran on a plan, the others on the stock kernel.
    mixed_steps: int = 0
    #: Steps that took the stock path altogether.
    stock_steps: int = 0
    #: Rows that ran on plans.
    planned_rows: int = 0
    #: Calls of our kernel from Python: eager steps, and one per layer at each capture of a graph.
    kernel_calls: int = 0
    #: KV bytes per layer of the sampled plans: read by the plan, and if every row read its own.
    planned_kv_bytes: int = 0
    flat_kv_bytes: int = 0

    def count(self, kind: str) -> bool:
        """Count a step of ``kind`` ``"decode"``, ``"mixed"`` or ``"stock"``.

        Returns:
            Whether a line in the log is due.
        """
        setattr(self, f"{kind}_steps", getattr(self, f"{kind}_steps") + 1)
        return LOG_EVERY > 0 and self.steps % LOG_EVERY == 0

    @property
    def steps(self) -> int:
        """All steps."""
        return self.decode_steps + self.mixed_steps + self.stock_steps

    def is_sample_due(self) -> bool:
        """Whether this step's plan is one to sum up."""
        return (self.decode_steps + self.mixed_steps) % SAMPLE_EVERY == 1

    def sample(self, summary: dict) -> None:
        """Add a plan's summary."""
        self.planned_kv_bytes += summary["planned_kv_bytes"]
        self.flat_kv_bytes += summary["flat_kv_bytes"]

    def line(self) -> str:
        """The counters in words."""
        text = (
            f"{self.steps} steps: {self.decode_steps} on plans, {self.mixed_steps} with their decode rows on plans, "
            f"{self.stock_steps} on FlashAttention"
        )
        if self.flat_kv_bytes:
            saved = 1 - self.planned_kv_bytes / self.flat_kv_bytes
            text += f"; plans read {100 * saved:.1f}% fewer KV bytes than rows of their own would (sampled)"
        return text


#: Metrics by the first layer of the group; tests and tools read them.
GROUPS: dict[str, StepMetrics] = {}


def totals() -> StepMetrics:
    """The sum over the groups of this process."""
    total = StepMetrics()
    for metrics in GROUPS.values():
        for field in dataclasses.fields(StepMetrics):
            setattr(total, field.name, getattr(total, field.name) + getattr(metrics, field.name))
    return total
