"""The table of layer_compilation.py."""

from __future__ import annotations

from tables import Result, interval, setting, table


def layer_compilation(result: Result) -> str:
    """A row for each contestant."""
    settings, rows = result["settings"], result["rows"]
    recomputed = "on" if settings["checkpointing"] else "off"
    lengths = ", ".join(f"{tokens} ({percent}%)" for tokens, percent in settings["batches"])
    size = (
        f"{settings['size']}, {settings['dtype']}, training {settings['training']}, gradient "
        f"checkpointing {recomputed}; {settings['rows']} rows a batch, {settings['threads']} CPU "
        f"thread(s), whose processor time is given, {settings['repetitions']} rounds."
    )
    compiled = rows["compiled"]
    later = compiled["graphs_after_rounds"] - compiled["graphs"]
    lines = [
        setting(result),
        f"- Size: {size}",
        f"- Tokens of a row (learned): {lengths}",
        f"- {compiled['graphs']} graphs, {compiled['graph_breaks']} graph breaks; {later} graphs "
        "more in the timed rounds",
        f"- Of a step of the layers as they are, products of matrices take "
        f"{interval(result['product_share'], 100, 1)}%; in the other operations graphs save "
        f"{interval(result['saved_share'], 100, 1)}% of the step",
        "",
    ]
    header = ["", "first pass over the batches, s", "step, ms", "time / as they are"]
    cells = [
        [
            text,
            f"{rows[name]['first_pass_seconds']:,.0f}",
            interval(rows[name]["seconds"], 1e3, 0),
            interval(result["ratio"], digits=3) if name == "compiled" else "1",
        ]
        for name, text in result["contestants"].items()
    ]
    return "\n".join([*lines, table(header, cells)])
