"""The tables of the documents: from a result to Markdown. `render.py` puts them in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"

Result = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def setting(result: Result) -> str:
    """Where, when and with what a result was measured."""
    machine = result["machine"]
    lines = [
        f"- Command: `{result['command']}`",
        f"- Machine: {machine['cpu']}, {machine['num_cores']} cores, {machine['ram_gib']:g} GiB "
        f"RAM; load average before the start {machine['load_before']:g}",
        *gpu_line(machine),
        f"- {result['os']}; Python {result['python']}, torch {result['torch']}, transformers "
        f"{result['transformers']}, gemtune {result['gemtune']} at revision "
        f"{result['git_revision']}, {result['date']}",
    ]
    return "\n".join(lines)


def gpu_line(machine: Result) -> list[str]:
    """The GPU, where there was one."""
    if not (gpu := machine.get("gpu")):
        return []
    return [
        f"- GPU: {gpu['name']}, {gpu['memory_gib']:g} GiB, driver {gpu['driver']}, CUDA "
        f"{gpu['cuda']}"
    ]


def default_run(result: Result) -> str:
    """A row for each seed."""
    kinds = sorted({kind for row in result["seeds"] for kind in row["exact_match_by_kind"]})
    header = ["device, seed", "exact match", *(kind.replace("_", " ") for kind in kinds)]
    header += ["eval/loss", "wall time", "peak memory"]
    rows = []
    for row in result["seeds"]:
        cells = [f"CPU, {row['seed']}", f"{row['exact_match']:.1%}"]
        cells += [f"{row['exact_match_by_kind'][kind]:.1%}" for kind in kinds]
        minutes, seconds = divmod(round(row["wall_seconds"]), 60)
        cells += [
            f"{row['eval_loss_first']:.2f} → {row['eval_loss_last']:.4f}",
            f"{minutes}:{seconds:02} min",
            f"{row['peak_rss_gib']:.2f} GiB",
        ]
        rows.append(cells)
    rows.append(["GPU", *[NOT_MEASURED] * (len(header) - 1)])
    first = result["seeds"][0]
    note = f"{first['num_steps']} steps, then {first['num_answers']} generated answers."
    return f"{setting(result)}\n\n{table(header, rows)}\n\n{note}"


def interval(values: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """Median (smallest to largest)."""
    low, middle, high = (f"{values[key] * scale:,.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low}–{high})"


def linear_cross_entropy(result: Result) -> str:
    """Three tables for each head: time over the matmuls, milliseconds, and memory."""
    settings = result["settings"]
    on_gpu = settings.get("device") == "cuda"
    place = "on the GPU" if on_gpu else f"{settings['threads']} thread(s)"
    size = (
        f"N = {settings['rows']} rows, H = {settings['hidden']}, V = {settings['vocabulary']}, "
        f"cap {settings['softcap']:g}, {settings['dtype']}, {place}, "
        f"{settings['repetitions']} rounds."
    )
    parts = [setting(result), f"- Size: {size}"]
    if peers := result.get("peers"):
        parts.append("- Peers: " + ", ".join(f"{name} {text}" for name, text in peers.items()))
    names = [f"- `{name}`: {text}" for name, text in result["contestants"].items()]
    parts += ["", *names, ""]
    for frozen, head in ((False, "Full head"), (True, "Frozen head")):
        cases = [case for case in result["cases"] if case["frozen_head"] is frozen]
        if not cases:
            continue
        for title, cell in (
            ("time divided by the time of the matmuls that are needed", ratio_cell),
            ("milliseconds, forward and backward", milliseconds_cell),
            ("peak memory above the inputs, MiB", memory_cell),
        ):
            parts += [f"**{head}: {title}**", "", contest(result, cases, cell), ""]
    return "\n".join(parts).strip()


def contest(result: Result, cases: list[Result], cell: Callable[[Result], str]) -> str:
    """Contestants down, shares of ignored labels across."""
    header = ["ignored labels", *(f"{case['ignored_percent']}%" for case in cases)]
    rows = []
    for name in result["contestants"]:
        cells = []
        for case in cases:
            missing = "out of memory" if name in case.get("out_of_memory", ()) else ""
            cells.append(cell(case["rows"][name]) if name in case["rows"] else missing)
        if any(cells):
            rows.append([f"`{name}`", *cells])
    if cell is memory_cell:
        sizes = (f"{case['gradients_mib']:,.0f}" for case in cases)
        rows.append(["the gradients alone (computed)", *sizes])
    for text in result["not_measured"].values():
        # The reason, if there is one, stays beside the name.
        rows.append([text.replace(f": {NOT_MEASURED}", ""), *[NOT_MEASURED] * len(cases)])
    return table(header, rows)


def ratio_cell(row: Result) -> str:
    return interval(row["ratio_to_matmuls"])


def milliseconds_cell(row: Result) -> str:
    return interval(row["seconds"], 1e3, 0)


def memory_cell(row: Result) -> str:
    return "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"


def vision_position_lookup(result: Result) -> str:
    """Each way, and what the one-hot takes for more images than fit here."""
    settings, computed = result["settings"], result["computed_one_hot"]
    size = (
        f"{settings['images']} images of {settings['patches']} patches, 2 tables of "
        f"{settings['table']} rows, hidden size {settings['hidden']}, {settings['dtype']}, "
        f"{settings['threads']} thread(s), {settings['repetitions']} rounds."
    )
    header = ["", "milliseconds", "time / lookup", "peak above the inputs"]
    rows = [
        [text, *lookup_cells(result["rows"][name])] for name, text in result["contestants"].items()
    ]
    rows.append(["the gradient alone (computed)", "", "", f"{result['gradient_mib']:,.0f} MiB"])
    rows.append(["any of them on a GPU", *[NOT_MEASURED] * 3])
    note = (
        f"Computed, not measured: the one-hot of {computed['images']} such images is "
        f"{computed['int64_gib']:.2f} GiB in int64, and its bfloat16 copy "
        f"{computed['bfloat16_gib']:.2f} GiB."
    )
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}\n\n{note}"


def relative_position_lookup(result: Result) -> str:
    """Each way with each number of tokens; what does not fit is computed."""
    settings = result["settings"]
    size = (
        f"r_max {settings['r_max']}, s_max {settings['s_max']}, hidden size {settings['hidden']}, "
        f"{settings['dtype']}, {settings['threads']} thread(s), {settings['repetitions']} rounds."
    )
    header = ["tokens", "", "milliseconds", "time / lookup", "peak above the inputs", "computed"]
    rows = []
    for case in result["cases"]:
        for name, text in result["contestants"].items():
            row = case["rows"].get(name)
            cells = [NOT_MEASURED] * 3 if row is None else lookup_cells(row)
            computed = f"{case['computed_mib'][name]:,.0f} MiB"
            rows.append([f"{case['tokens']:,}", text, *cells, computed])
    rows.append(["any", "any of them on a GPU", *[NOT_MEASURED] * 3, ""])
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def supervised_positions(result: Result) -> str:
    """A row for each share of supervised tokens."""
    settings = result["settings"]
    recomputed = "on" if settings["checkpointing"] else "off"
    size = (
        f"{settings['size']}, {settings['parameters'] / 1e6:,.0f} M parameters, "
        f"{settings['dtype']}, training {settings['training']}, gradient checkpointing "
        f"{recomputed}; {settings['rows']} rows of {settings['text_tokens']} tokens, "
        f"{settings['threads']} CPU thread(s), {settings['repetitions']} rounds."
    )
    header = ["supervised", "all positions, ms", "supervised ones, ms", "faster by"]
    header += ["operations allow", "peak, all positions", "peak, supervised ones"]
    rows = []
    for case in result["cases"]:
        full, lean = case["rows"]["full"], case["rows"]["supervised_positions"]
        rows.append(
            [
                f"{case['supervised_percent']}%",
                interval(full["seconds"], 1e3, 0),
                interval(lean["seconds"], 1e3, 0),
                interval(case["speedup"]),
                f"{case['speedup_allowed']:.2f}",
                *(
                    NOT_MEASURED if row["peak_mib"] is None else f"{row['peak_mib']:,.0f} MiB"
                    for row in (full, lean)
                ),
            ]
        )
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def checkpoint_saves(result: Result) -> str:
    """How long each keeps the training waiting, and until it is done."""
    settings = result["settings"]
    size = (
        f"{settings['parameters'] / 1e6:,.0f} M parameters in {settings['dtype']} and their AdamW "
        f"state, one process, {settings['threads']} thread(s), {settings['repetitions']} rounds; "
        f"accelerate {result['accelerate']}."
    )
    header = ["", "training waits, s", "waits / copy", "done after, s", "done / gemtune", "MiB"]
    rows = []
    for name, text in result["contestants"].items():
        row = result["rows"][name]
        cells = [interval(row["stall_seconds"]), interval(row["stall_ratio_to_copy"])]
        cells += [interval(row["total_seconds"]), interval(row["total_ratio_to_gemtune"])]
        rows.append([text, *cells, f"{row['mib']:,.0f}"])
    rows.append(["any of them on a GPU", *[NOT_MEASURED] * 5])
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def memory_plan(result: Result) -> str:
    """Planned and measured peaks of whole steps."""
    settings, bound = result["settings"], result["bound"]
    size = (
        f"{settings['threads']} thread(s), medians of {settings['repetitions']} processes; aim: "
        f"within {bound['fraction']:.0%} or {bound['mib']} MiB."
    )
    header = ["model", "run", "batch", "planned", "measured (min-max)", "error", "plan took"]
    rows = [
        [
            f"{row['size']}, {row['num_parameters'] / 1e6:,.1f} M",
            f"`{' '.join(row['overrides'])}`",
            row["batch"],
            f"{row['planned_mib']:,.0f} MiB, {row['phase']}",
            interval(row["measured_mib"], 1.0, 0) + " MiB",
            f"{row['error']:+.1%}, {row['error_mib']:+,.0f} MiB"
            + ("" if row["within"] else " (missed)"),
            f"{row['plan_seconds']:.0f} s",
        ]
        for row in result["cases"].values()
    ]
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def plan_times(result: Result) -> str:
    """Time and memory of the planner itself."""
    settings = result["settings"]
    size = f"{settings['threads']} thread, medians of {settings['repetitions']} processes."
    header = ["keys", "batch", "the plan says", "it took (min-max)", "of memory"]
    rows = [
        [
            f"`{' '.join(row['keys'])}`",
            row["batch"],
            f"{row['planned_gib']:,.1f} GiB, {row['phase']}",
            interval(row["seconds"], 1.0, 0) + " s",
            f"{row['planner_gib']:.2f} GiB",
        ]
        for row in result["cases"].values()
    ]
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def step_records(result: Result) -> str:
    """Shares of a step."""
    settings, seconds = result["settings"], result["step_seconds"]
    size = (
        f"the default run, {settings['steps']} steps of {interval(seconds, 1e3, 0)} ms, "
        f"{settings['threads']} thread(s)."
    )
    rows = [[name, interval(share, 100, 3) + " %"] for name, share in result["shares"].items()]
    rows.append(["together", interval(result["share"], 100, 3) + " %"])
    header = ["what", "share of a step (min-max)"]
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def data_preparation(result: Result) -> str:
    """Rows a second, and how often TRL's."""
    settings = result["settings"]
    size = (
        f"{settings['rows']:,} rows of {settings['tokens_per_row']:.0f} tokens "
        f"({settings['characters_per_row']:.0f} characters) in the mean, one process, "
        f"{settings['threads']} thread(s), {settings['repetitions']} rounds; ids and labels of "
        f"{settings['rows_compared']:,} rows are the same in both; TRL {result['trl']}, datasets "
        f"{result['datasets']}."
    )
    header = ["", "rows a second of one core", "rows a second", "times TRL"]
    rows = [
        [
            text,
            interval(result["rows"][name]["rows_per_processor_second"], 1.0, 0),
            interval(result["rows"][name]["rows_per_second"], 1.0, 0),
            interval(result["rows"][name]["ratio_to_trl"], 1.0, 1),
        ]
        for name, text in result["contestants"].items()
    ]
    return f"{setting(result)}\n- Size: {size}\n\n{table(header, rows)}"


def lookup_cells(row: Result) -> list[str]:
    """Milliseconds, time over that of the lookup, peak."""
    peak = NOT_MEASURED if row["peak_mib"] is None else f"{row['peak_mib']:,.0f} MiB"
    return [interval(row["seconds"], 1e3, 0), interval(row["ratio_to_lookup"], 1.0, 1), peak]


def price_tags(result: Result) -> str:
    """What was run, and a table against no patch and one against all patches."""
    settings = result["settings"]
    training = settings["training"]
    if training == "full":
        training += f" (frozen: {', '.join(settings['frozen']) or 'nothing'})"
    recomputed = "on" if settings["checkpointing"] else "off"
    lines = [
        setting(result),
        f"- Model: {settings['size']}, {settings['parameters'] / 1e6:,.0f} M parameters, "
        f"{settings['trained_parameters'] / 1e6:,.0f} M of them trained; {settings['dtype']}; "
        f"training {training}; gradient checkpointing {recomputed}",
        f"- Batch: {settings['rows']} rows of up to {settings['length']} tokens, "
        f"{settings['tokens']} in all, {settings['supervised_tokens']} with a label; "
        f"{settings['images']} images of up to {settings['soft_tokens']} soft tokens",
        f"- {settings['rounds']} rounds, {settings['threads']} CPU thread(s); peak memory from: "
        f"{settings['peak_source']}",
    ]
    for title, header, rows in price_tables(result):
        lines += ["", f"**{title}**", "", table(header, rows)]
    picture = f"patches_{settings['size']}_{settings['device']}.png"
    if (RESULTS / picture).exists():
        what = "Each patch against none: peak memory, bytes kept for the backward pass, step time"
        lines += ["", f"![{what}](benchmarks/results/{picture})"]
    return "\n".join(lines)


def price_tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows): each alone against none, then all but each against all."""
    rows = {row["name"]: row for row in result["rows"]}
    all_but = [name for name in rows if name.startswith("all but ")]
    # Biggest saver first: of peak memory, else of what is kept.
    alone = sorted(
        (row for name, row in rows.items() if name not in [*all_but, "none"]), key=price_order
    )
    what = ["step, ms", "time / none"]
    header = ["", "peak, MiB", "vs none", "kept for backward, MiB", "vs none", *what]
    first = [price_row(row, rows["none"]) for row in [rows["none"], *alone]]
    tables = [("Against no patch, biggest saver first", header, first)]
    if all_but and "all" in rows:
        left_out = sorted((rows[name] for name in all_but), key=lambda row: price_order(row, -1))
        header = ["", "peak, MiB", "vs all", "kept for backward, MiB", "vs all", *what]
        second = [price_row(row, rows["all"]) for row in [rows["all"], *left_out]]
        tables.append(("All but one, against all patches", header, second))
    return tables


def price_order(row: Result, sign: int = 1) -> tuple[bool, bool, float, float]:
    """The smallest peak first (the largest with a sign of -1), what was not measured last."""
    peak, saved = row["peak_mib"], row["saved_mib"]
    unknown = row["status"] != "measured", peak is None
    return *unknown, sign * (peak or 0.0), sign * (saved or 0.0)


def signed(value: float, digits: int) -> str:
    """With its sign; what rounds to nothing has none."""
    return f"{value:+,.{digits}f}" if round(value, digits) else "0"


def price_row(row: Result, reference: Result) -> list[str]:
    """Cells of a contestant; the reason where it has nothing to measure."""
    name = f"`{row['name']}`"
    if row["status"] not in ("measured", NOT_MEASURED):
        return [f"{name}: {row['status']} ({row['reason']})", *[""] * 6]
    cells = [name]
    for key in ("peak_mib", "saved_mib"):
        if row[key] is None:
            cells += [NOT_MEASURED, ""]
            continue
        known = row is not reference and reference[key] is not None
        digits = 1 if row[key] < 100 else 0
        above = signed(row[key] - reference[key], digits) if known else ""
        cells += [f"{row[key]:,.{digits}f}", above]
    if row["seconds"] is None:
        return [*cells, NOT_MEASURED, NOT_MEASURED]
    return [*cells, interval(row["seconds"], 1e3, 0), interval(row["ratio"])]


def soak(result: Result) -> str:
    """How often runs were killed, and where."""
    header = ["checkpoints are written", "kills", "in a save", "elsewhere"]
    rows = []
    for way, counts in result["ways"].items():
        total, in_save = sum(counts.values()), counts.get("a save", 0)
        rows.append([way, str(total), str(in_save), str(total - in_save)])
    note = (
        "After each kill every checkpoint on disk verified; after the last one the losses of all "
        "steps, and every bit of parameters, optimizer and random numbers, were those of a run "
        "that was never killed."
    )
    return f"{setting(result)}\n\n{table(header, rows)}\n\n{note}"
