"""The tables of whole steps: real_sizes.py, and planned memory on a GPU."""

from __future__ import annotations

from tables import NOT_MEASURED, Result, interval, setting, table


def real_sizes(result: Result) -> str:
    """A table for each case, a contestant a row."""
    settings, bounds = result["settings"], result["bounds"]
    recomputed = "on" if settings["checkpointing"] else "off"
    place = "the GPU"
    if settings["device"] == "cpu":
        place = f"{settings['threads']} CPU thread(s), whose processor time is given"
    peers = ", ".join(f"{name} {text}" for name, text in result["peers"].items())
    lines = [
        setting(result),
        f"- With {peers}; {settings['dtype']}, gradient checkpointing {recomputed}, on {place}",
        f"- {settings['steps']} timed steps of each process after {settings['warm_up']} others; "
        f"batches of {settings['rows']} rows of {settings['row_tokens']:,} tokens, the last "
        f"{settings['learned_percent']}% of their text learned",
        f"- In the first step losses agree within {bounds['loss']:.0e} and gradients within "
        f"{bounds['gradients']:g}, relative to transformers, or the script stops",
    ]
    for name, case in result["cases"].items():
        lines += ["", *case_lines(result, name, case)]
    return "\n".join(lines)


def case_lines(result: Result, name: str, case: Result) -> list[str]:
    """Title, what is trained on what, and the table."""
    if "not_measured" in case:
        return [f"**`{name}`**: {NOT_MEASURED} ({case['not_measured']})"]
    title = f"**`{name}`**"
    if "batch" in case:
        batch = case["batch"]
        title += (
            f": {case['trained_parameters'] / 1e6:,.1f} M of {case['parameters'] / 1e6:,.0f} M "
            f"parameters trained; {batch['tokens']:,} tokens, {batch['supervised_tokens']:,} of "
            f"them learned, {batch['images']} images; {case['rounds']} round(s)"
        )
    on_gpu = result["settings"]["device"] == "cuda"
    header = ["", "step, ms", "tokens/s", "time / transformers", "peak, GiB"]
    header += ["reserved, GiB"] if on_gpu else []
    header += ["loss of the first step"]
    rows = []
    for key, text in result["contestants"].items():
        width = len(header) - 1
        if key in result["not_measured"]:
            rows.append([f"{text} ({result['not_measured'][key]})", *[NOT_MEASURED] * width])
        elif case["rows"][key].get("out_of_memory"):
            rows.append([text, *["out of memory"] * width])
        else:
            rows.append([text, *step_cells(case["rows"][key], on_gpu)])
    return [title, "", table(header, rows)]


def step_cells(row: Result, on_gpu: bool) -> list[str]:
    """Time, throughput, memory, and the first loss."""
    cells = [interval(row["seconds"], 1e3, 0), f"{row['tokens_per_second']:,.0f}"]
    cells.append(interval(row["ratio"]) if "ratio" in row else "")
    cells.append(interval(row["peak_gib"]))
    if on_gpu:
        cells.append(interval(row["reserved_gib"]))
    return [*cells, f"{row['losses'][0]:.5f}"]


def memory_plan_cuda(result: Result) -> str:
    """Planned peaks beside the allocator's."""
    settings = result["settings"]
    size = (
        f"one row a batch, {settings['learned']:.0%} of it learned, step {settings['steps']} of "
        f"each process; aim: within {result['bound']:.0%}."
    )
    header = ["run", "batch", "planned", "measured", "error", "reserved", "plan took"]
    rows = []
    for row in result["cases"].values():
        keys = f"`{' '.join(row['keys'])}`"
        if "not_measured" in row:
            rows.append([f"{keys} ({row['not_measured']})", *[NOT_MEASURED] * 6])
            continue
        planned = f"{row['planned_gib']:,.2f} GiB, {row['phase']}"
        cells = ["out of memory", "", ""]
        if not row.get("out_of_memory"):
            missed = "" if row["within"] else " (missed)"
            cells = [f"{row['measured_gib']:,.2f} GiB", f"{row['error']:+.1%}{missed}"]
            cells.append(f"{row['reserved_gib']:,.2f} GiB" if row["reserved_gib"] else "")
        rows.append([keys, row["batch"], planned, *cells, f"{row['plan_seconds']:.0f} s"])
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"
