"""What the contestants of real_sizes.py found, compared: they must agree before times mean much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from measure import spread
from workbench import Outcome, errors

REFERENCE = "transformers"
# Largest relative differences from it in the first step: of the loss, and of sampled gradients as
# one vector. A gradient of other labels or weights differs by about 1.4.
BOUNDS = {"float32": (1e-5, 1e-3), "bfloat16": (2e-3, 0.5)}

Part = dict[str, Any]
"""What one process found."""


def refuse_disagreement(
    case: str, first: Mapping[str, Outcome], dtype: str
) -> dict[str, dict[str, float]]:
    """Contestant -> how far its first step is from that of stock transformers.

    Where that ran out of memory it is compared with the first of the others.

    Raises:
        SystemExit: further than `BOUNDS`; it says who, and by how much.
    """
    if not first:
        return {}
    reference = first.get(REFERENCE) or next(iter(first.values()))
    found = {}
    for name, outcome in first.items():
        loss, gradients = errors(outcome, reference)
        found[name] = {"loss": loss, "gradients": gradients}
        largest_loss, largest_gradients = BOUNDS[dtype]
        if not (loss <= largest_loss and gradients <= largest_gradients):
            raise SystemExit(
                f"{case}: {name} does not train what the others train. In the first step its loss "
                f"differs by {loss:.1e} (bound {largest_loss:.0e}) and its gradients by "
                f"{gradients:.1e} (bound {largest_gradients:.0e}). Nothing of the case is written."
            )
    return found


def case_of(
    parts: Mapping[str, list[Part]], differences: Mapping[str, dict[str, float]]
) -> dict[str, Any]:
    """The case as it is written, from what the processes found."""
    fitting = {n: rounds for n, rounds in parts.items() if not any_out_of_memory(rounds)}
    rows: dict[str, Any] = {}
    for name, rounds in parts.items():
        if name not in fitting:
            rows[name] = {"out_of_memory": True}
            continue
        seconds = [each for part in rounds for each in part["seconds"]]
        rows[name] = {
            "seconds": spread(seconds),
            "tokens_per_second": rounds[0]["batch"]["tokens"] / spread(seconds)["median"],
            "peak_gib": spread([part["peak_gib"] for part in rounds]),
            "reserved_gib": None
            if rounds[0]["reserved_gib"] is None
            else spread([part["reserved_gib"] for part in rounds]),
            "losses": rounds[0]["losses"],
            "first_step_differences": differences[name],
        }
        if REFERENCE in fitting:
            rows[name]["ratio"] = spread(
                [median(a) / median(b) for a, b in zip(rounds, fitting[REFERENCE], strict=True)]
            )
    facts: dict[str, Any] = {}
    if fitting:
        any_part = next(iter(fitting.values()))[0]
        facts = {key: any_part[key] for key in ("batch", "parameters", "trained_parameters")}
    return facts | {"rounds": len(next(iter(parts.values()))), "rows": rows}


def any_out_of_memory(rounds: Sequence[Mapping[str, Any]]) -> bool:
    return any(part.get("out_of_memory") for part in rounds)


def median(part: Mapping[str, Any]) -> float:
    return spread(part["seconds"])["median"]


def line_of(name: str, part: Mapping[str, Any]) -> str:
    """What is printed when a process is done."""
    if part.get("out_of_memory"):
        return f"{name}: out of memory"
    return (
        f"{name}: {median(part) * 1e3:,.0f} ms, "
        f"{part['batch']['tokens'] / median(part):,.0f} tokens/s, peak {part['peak_gib']:.2f} GiB, "
        f"first loss {part['losses'][0]:.6f}"
    )
