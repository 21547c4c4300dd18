"""Rows of findings as Markdown: a table, a summary, and what went wrong."""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]

EVAL_ERROR = 1e-10  # relative, in float64
TRAIN_ERROR = 1e-9  # batch statistics of small maps amplify the last digit
ENOUGH = 0.98  # of the removable parameters
PEERS_WORK = {
    "Torch-Pruning's pruner, which finds what to cut as compile() does": "pruner",
    "Torch-Pruning's cutting alone, of channels that are given": "peer",
}


def is_traced(part: Row) -> bool:
    """A narrow network came out."""
    return "removed" in part


def is_exact(part: Row) -> bool:
    """Equal in eval mode, for another batch size and resolution (unless the report said that the
    network's code decides by sizes); in train mode too, where that was compared; and its backward
    pass gives finite gradients."""
    errors = [(part.get("eval_error"), EVAL_ERROR)]
    limits = {"resized_error": EVAL_ERROR, "train_error": TRAIN_ERROR}
    if part.get("decided"):
        del limits["resized_error"]
    errors += [(part[key], limit) for key, limit in limits.items() if key in part]
    return (
        all(_small(value, limit) for value, limit in errors)
        and not part.get("refused")
        and not part.get("error")
        and part.get("backward", "") == ""
    )


def _small(value: Any, limit: float) -> bool:
    if isinstance(value, str):
        return value.startswith("the original:")  # it does not run in that mode itself
    return value is not None and value <= limit


def share(row: Row) -> float | None:
    """Removed of what is removable."""
    ours = row["ours"]
    if not ours.get("removable") or "removed" not in ours:
        return None
    return float(ours["removed"] / ours["removable"])


def time_ratio(row: Row, of: str = "peer") -> float | None:
    """Our seconds relative to those `of` Torch-Pruning, where both gave a network."""
    ours, peer = row["ours"].get("seconds"), row.get(of, {}).get("seconds")
    return ours / peer if ours and peer else None


def summary(rows: list[Row]) -> list[str]:
    """The figures that matter, as lines."""
    ours = [row["ours"] for row in rows]
    shares = [s for row in rows if (s := share(row)) is not None]
    lines = [
        f"{len(rows)} networks: {_count(is_traced(p) for p in ours)} traced, "
        f"{_count(is_traced(p) and is_exact(p) for p in ours)} exact, "
        f"{_count(s >= ENOUGH for s in shares)} with at least {ENOUGH:.0%} of the removable gone."
    ]
    peers = [row["peer"] for row in rows if row["peer"]]
    if peers:
        lines.append(
            f"Torch-Pruning, {len(peers)} networks: {_count(map(is_traced, peers))} give a network "
            f"that runs, {_count(is_traced(p) and is_exact(p) for p in peers)} an exact one."
        )
    for what, of in PEERS_WORK.items():
        ratios = [r for row in rows if (r := time_ratio(row, of)) is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(
                f"Time relative to {what}, geometric mean over {len(ratios)} networks that both "
                f"give: {mean:.2f} (goal: at most 0.5)."
            )
    return lines


def _count(flags: Any) -> int:
    return sum(bool(flag) for flag in flags)


def markdown(rows: list[Row], about: list[str]) -> str:
    """The whole page."""
    sections = ["# The zoo", *about]
    for deaths in dict.fromkeys(row["deaths"] for row in rows):
        for suite in dict.fromkeys(row["suite"] for row in rows):
            chosen = [r for r in rows if (r["deaths"], r["suite"]) == (deaths, suite)]
            if chosen:
                lines = "\n".join(f"- {line}" for line in summary(chosen))
                sections.append(
                    f"## {suite}, dead channels {deaths}\n\n{lines}\n\n{_table(chosen)}"
                )
    troubles = [line for row in rows for line in _troubles(row)]
    if troubles:
        sections.append("## What is missing\n\n" + "\n".join(troubles))
    return "\n\n".join(sections) + "\n"


HEAD = (
    "network", "params (M)", "traced", "exact", "eval error", "train error", "removed / removable",
    "share", "s", "verify s", "TP exact", "TP removed", "TP s", "time / TP", "TP pruner s",
    "time / TP pruner",
)  # fmt: skip


def _table(rows: list[Row]) -> str:
    lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> list[str]:
    ours, peer = row["ours"], row["peer"]
    traced = ours.get("front_end", "no") if is_traced(ours) else "no"
    partly = f" ({len(ours['opaque'])} left whole)" if ours.get("opaque") else ""
    return [
        row["network"] + (f" ({row['reduced']})" if row.get("reduced") else ""),
        _millions(ours.get("params")),
        traced + partly,
        _exactness(ours),
        _error(ours.get("eval_error")),
        _error(ours.get("train_error")),
        f"{_millions(ours.get('removed'))} / {_millions(ours.get('removable'))}",
        "" if share(row) is None else f"{share(row):.1%}",
        _seconds(ours.get("seconds")),
        _seconds(ours.get("verify_s")),
        ("yes" if is_exact(peer) else "NO") if is_traced(peer) else ("fails" if peer else ""),
        _millions(peer.get("removed")),
        _seconds(peer.get("seconds")),
        _ratio(time_ratio(row)),
        _seconds(row.get("pruner", {}).get("seconds")),
        _ratio(time_ratio(row, "pruner")),
    ]


def _exactness(ours: Row) -> str:
    if not (is_traced(ours) and is_exact(ours)):
        return "NO"
    return "yes" if is_exact({**ours, "decided": []}) else "at its size"


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(value: Any) -> str:
    if value is None:
        return ""
    return "n/a" if isinstance(value, str) else f"{value:.0e}"


def _troubles(row: Row) -> list[str]:
    """What a reader should know about this row, a line each."""
    ours, peer = row["ours"], row["peer"]
    found = [f"{key}: {ours[key]}" for key in ("error", "refused", "oracle_error") if ours.get(key)]
    found += [f"{key}: {ours[key]}" for key in ("resized_error", "train_error", "backward")
              if isinstance(ours.get(key), str) and ours[key]]  # fmt: skip
    found += [
        f"left whole: {name}: {why}" for name, why in list(ours.get("opaque", {}).items())[:3]
    ]
    if _exactness(ours) == "at its size":
        error = ours["resized_error"]
        found.append(f"at another size: {error}; as reported, {', '.join(ours['decided'])}")
    part = share(row)
    if part is not None and part < ENOUGH:
        found += [f"stays: {reason}" for reason in ours.get("pinned", [])]
    if peer.get("error"):
        found.append(f"Torch-Pruning: {peer['error']}")
    name = f"{row['network']}, {row['deaths']}"
    return [f"- **{name}**: {line}" for line in found]
