"""Several sources in one order: how often each comes, decided by weights, seed and index alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemtune.errors import ConfigError
from gemtune.options import did_you_mean


@dataclass
class MixEntry:
    """One source of `data.mix`."""

    path: str
    weight: float | None = None
    """Share of the rows, in proportion to the other weights; None for all: as many as there are."""
    split: str = "train"
    subset: str | None = None
    filter: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    media_root: str | None = None


def read_mix(given: Sequence[Any], key: str = "data.mix") -> list[MixEntry]:
    """The entries, checked.

    Raises:
        ConfigError: an unknown key, no path, a weight that is no positive number, or weights for
            some of the sources only.
    """
    fields = [f.name for f in dataclasses.fields(MixEntry)]
    entries = []
    for number, values in enumerate(given):
        place = f"{key}[{number}]"
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{place}={values!r} must be an object: {key}='[{{path: a.jsonl, weight: 2}}, "
                "{path: b.jsonl, weight: 1}]'."
            )
        for name in values:
            if name not in fields:
                raise ConfigError(
                    f"{place}.{name} is not a field of a source."
                    f"{did_you_mean(str(name), fields)} Fields: {', '.join(fields)}."
                )
        _check_types(values, place)
        entries.append(MixEntry(**values))
    weighed = [entry.weight is not None for entry in entries]
    if any(weighed) and not all(weighed):
        raise ConfigError(
            f"{key}[{weighed.index(False)}] has no weight, but others have. Give one to each, or "
            "to none (then every row comes once)."
        )
    return entries


def _check_types(values: Mapping[str, Any], place: str) -> None:
    if not isinstance(values.get("path"), str) or not values["path"]:
        raise ConfigError(f"{place}.path={values.get('path')!r} must name a file or dataset.")
    for name, kind in (("split", str), ("subset", str), ("media_root", str)):
        if values.get(name) is not None and not isinstance(values[name], kind):
            raise ConfigError(f"{place}.{name}={values[name]!r} must be a text.")
    for name in ("filter", "columns"):
        if not isinstance(values.get(name, {}), Mapping):
            raise ConfigError(f"{place}.{name}={values[name]!r} must be an object.")
    weight = values.get("weight")
    if weight is None:
        return
    numeric = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not numeric or not math.isfinite(weight) or weight <= 0:
        raise ConfigError(f"{place}.weight={weight} must be a finite number above 0.")


def epoch_counts(
    num_rows: Sequence[int], weights: Sequence[float | None], epoch: str = "all"
) -> list[int]:
    """How many rows of each source an epoch has, in the proportion of the weights.

    Args:
        num_rows: rows of each source; all above 0.
        epoch: "all" lasts until every row of every source came at least once, so that some come
            again; "first" until the first source is used up, so that none does.
    """
    if any(weight is None for weight in weights):
        return list(num_rows)
    total = math.fsum(weights)  # type: ignore[arg-type]
    shares = [weight / total for weight in weights]  # type: ignore[operator]
    lengths = [rows / share for rows, share in zip(num_rows, shares, strict=True)]
    length = max(lengths) if epoch == "all" else min(lengths)
    counts = [round(length * share) for share in shares]
    if epoch == "all":
        return [max(count, rows) for count, rows in zip(counts, num_rows, strict=True)]
    return [min(max(count, 1), rows) for count, rows in zip(counts, num_rows, strict=True)]


def interleave(
    num_rows: Sequence[int],
    weights: Sequence[float | None],
    seed: int,
    epoch: str = "all",
) -> tuple[np.ndarray, np.ndarray]:
    """Which row comes at each place of an epoch: ([N] sources, [N] rows), a pure function.

    The sources are spread evenly: at every place, each has come within one row (two sources) or
    as many rows as there are other sources of its share. A source that comes less or more than
    once gives its rows in an order drawn from the seed, a new one for every time around, so that
    no row comes again before all others of its source have.
    """
    counts = epoch_counts(num_rows, weights, epoch)
    sources = np.repeat(np.arange(len(counts)), counts)
    rows = np.concatenate(
        [
            _rows_of(source, n, c, seed)
            for source, (n, c) in enumerate(zip(num_rows, counts, strict=True))
        ]
    )
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(due, kind="stable")  # equal ones in the order of the sources
    return sources[order], rows[order]


def _rows_of(source: int, num_rows: int, count: int, seed: int) -> np.ndarray:
    if count == num_rows:
        return np.arange(num_rows)
    rounds = []
    for number in range(math.ceil(count / num_rows)):
        sequence = np.random.SeedSequence([seed, source, number])
        rounds.append(np.random.Generator(np.random.PCG64(sequence)).permutation(num_rows))
    return np.concatenate(rounds)[:count]


def describe_mix(
    names: Sequence[str],
    num_rows: Sequence[int],
    weights: Sequence[float | None],
    epoch: str = "all",
) -> str:
    """One line: how often each source comes in an epoch."""
    counts = epoch_counts(num_rows, weights, epoch)
    total = sum(counts)
    listed = "; ".join(
        f"{name} {count:,} rows ({count / total:.1%}, {count / rows:.2f} times each)"
        for name, count, rows in zip(names, counts, num_rows, strict=True)
    )
    return f"an epoch of the mix has {total:,} rows: {listed}"
