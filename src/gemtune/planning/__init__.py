"""Peak memory of a run before it is launched: one step followed without values."""

from gemtune.planning.memory_plan import MemoryPlan, PlanConfig, plan_memory

__all__ = ["MemoryPlan", "PlanConfig", "plan_memory"]
