"""From a result of the GPU benchmark to lines that people read, and the verdict on every target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Line = dict[str, Any]
# Buffers that no checkpoint holds, and the allocator's rounding.
_SLACK_BYTES = 1 << 20
_MIB = 1 << 20


# -- targets ---------------------------------------------------------------------------------------


def targets(result: Line) -> list[Line]:
    """Every target with what was measured; `met` is None where nothing was, or nothing real."""
    stream = _found(result, "stream", "stream") or {}
    # GDS has no target of its own, and may be a way through host memory.
    transfers = {k: v for k, v in (stream.get("transfers") or {}).items() if k != "gds"}
    steps: list[Line] = [line for line in stream.get("steps") or [] if line["arm"] != "gds"]
    from_ram = [line for line in steps if line["arm"] == "ram"]
    from_disk = [line for line in steps if line["arm"].startswith("disk")]
    judged = [
        _share("RAM to device, share of the pinned-copy ceiling", 0.95, transfers, "ram"),
        _share("disk to device, share of the disk's ceiling", 0.90, transfers, "disk"),
        _most("step from RAM / max(compute, link)", 1.05, from_ram, _median("step_over_bound")),
        _most("step from disk / max(compute, link)", 1.10, from_disk, _median("step_over_bound")),
        _most(
            "weight stall where compute >= 1.2 x transfer",
            0.03,
            [line for line in steps if line["is_hidden"]],
            lambda line: line["weight_stall_ratio"],
        ),
        _most(
            "waits for the device in a step, beyond the resident model's",
            0,
            _with_own_syncs(steps, stream.get("resident") or []),
            lambda line: line["own_syncs"],
        ),
        _most(
            "device memory at its peak / (budget + activations)",
            1,
            [line for line in steps if line["device_peak_bytes"] is not None],
            lambda line: line["device_peak_bytes"] / (line["device_allowed_bytes"] + _SLACK_BYTES),
        ),
    ]
    if result["simulated"]:
        judged = [line | {"met": None} for line in judged]
    return judged


def _share(name: str, wanted: float, transfers: dict[str, Line], source: str) -> Line:
    """The worst arm decides, and is named."""
    shares = {
        arm: line["share_of_ceiling"]["median"]
        for arm, line in transfers.items()
        if line["source"] == source
    }
    worst = min(shares, key=lambda arm: shares[arm], default="")
    got = shares.get(worst)
    met = None if got is None else got >= wanted
    return {"target": name, "wanted": f">= {wanted}", "got": got, "met": met, "at": worst}


def _most(name: str, wanted: float, lines: Iterable[Line], value: Callable[[Line], float]) -> Line:
    """The worst line decides, and is named."""
    worst = max(lines, key=value, default=None)
    got = None if worst is None else value(worst)
    return {
        "target": name,
        "wanted": f"<= {wanted}",
        "got": got,
        "met": None if got is None else got <= wanted,
        "at": "" if worst is None else f"{worst['arm']}, {worst['tokens']} tokens",
    }


def _median(name: str) -> Callable[[Line], float]:
    return lambda line: float(line[name]["median"])


def _with_own_syncs(steps: Sequence[Line], resident: Sequence[Line]) -> list[Line]:
    models = {line["tokens"]: line["host_syncs"] for line in resident}
    return [
        line | {"own_syncs": line["host_syncs"] - models[line["tokens"]]}
        for line in steps
        if "host_syncs" in line
    ]


def _found(result: Line, part: str, name: str) -> Any:
    return result["parts"].get(part, {}).get("result", {}).get(name)


# -- tables ----------------------------------------------------------------------------------------


def tables(result: Line) -> str:
    """All of it, as text."""
    made = [
        ("parts", _parts(result)),
        ("ceilings, GB/s", _ceilings(result)),
        ("transfers alone", _transfers(result)),
        ("steps", _steps(result)),
        ("peers", _peers(result)),
        ("packed weights: decoding", _decoding(result)),
        ("packed weights: products, microseconds", _products(result)),
        ("compiled blocks", _compiled(result)),
        ("targets", [_target(line) for line in result["targets"]]),
    ]
    title = "SIMULATED DRIVER: these are no figures of a GPU\n\n" if result["simulated"] else ""
    texts = [f"-- {name}\n{table(lines)}" for name, lines in made if lines]
    return title + "\n\n".join(texts) + "\n"


def table(lines: Sequence[Line]) -> str:
    """Columns of equal width, numbers to the right."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    cells = [[_text(line.get(column, "")) for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    is_left = [isinstance(lines[0].get(column), str) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in (columns, *cells)
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parts(result: Line) -> list[Line]:
    lines = []
    for name, part in result["parts"].items():
        lines.append(
            {"part": name, "seconds": part["seconds"], "what": part["status"], "why": part["why"]}
        )
        for what, reason in part["skipped"].items():
            lines.append({"part": f"  {what}", "what": "skipped", "why": _first(reason)})
        for what, reason in part["errors"].items():
            lines.append({"part": f"  {what}", "what": "ERROR", "why": _last(reason)})
    return lines


def _first(text: str) -> str:
    return text.split(". ")[0].splitlines()[0][:90]


def _last(text: str) -> str:
    return text.strip().splitlines()[-1][:90]


def _ceilings(result: Line) -> list[Line]:
    """By the size of a piece."""
    found = result["parts"].get("ceilings", {}).get("result", {})
    rates = {name: found[name] for name in ("h2d_nexus", "h2d_torch") if name in found}
    if "disk" in found:
        disk = found["disk"]
        rates[f"disk, {disk['io_mode']} ({disk['reader']})"] = disk["nexus"]
        rates["disk, fio"] = {"1": disk["fio"]}
    if "d2d" in found:
        rates["d2d, read + written"] = {"2048": found["d2d"]}
    sizes = sorted({size for line in rates.values() for size in line}, key=int)
    return [
        {"what": name} | {f"{size} MiB": line.get(size, "") for size in sizes}
        for name, line in rates.items()
    ]


def _transfers(result: Line) -> list[Line]:
    found = (_found(result, "stream", "stream") or {}).get("transfers", {})
    return [
        {
            "arm": name,
            "mode": f"{line['io_mode']} ({line['reader']})",
            "groups": f"{line['streamed_groups']}+{line['resident_groups']}",
            "in RAM": line["ram_groups"],
            "chunk MiB": line["chunk_bytes"] / _MIB,
            "MiB": line["bytes_per_step"] / _MIB,
            "GB/s": line["bytes_per_step"] / line["seconds"]["median"] / 1e9,
            "of ceiling": line["share_of_ceiling"]["median"],
        }
        for name, line in found.items()
    ]


def _steps(result: Line) -> list[Line]:
    stream = _found(result, "stream", "stream") or {}
    return [
        {
            "arm": line.get("arm", "resident"),
            "tokens": line["tokens"],
            "step ms": line["step_seconds"]["median"] * 1e3,
            "compute ms": line.get("compute_seconds", line["step_seconds"]["median"]) * 1e3,
            "transfer ms": line.get("transfer_seconds", 0.0) * 1e3,
            "GB/s": line.get("gbps", ""),
            "of ceiling": line.get("share_of_ceiling", ""),
            "/ bound": line.get("step_over_bound", {}).get("median", ""),
            "/ parts": line.get("step_over_parts", {}).get("median", ""),
            "stall": line.get("weight_stall_ratio", ""),
            "syncs": line.get("host_syncs", ""),
            "waits": line.get("num_waits", ""),
            "peak MiB": _mib(line.get("device_peak_bytes")),
            "allowed": _mib(line.get("device_allowed_bytes")),
            "equal": line["equals_resident"],
        }
        for line in (*stream.get("resident", []), *stream.get("steps", []))
    ]


def _mib(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / _MIB


def _peers(result: Line) -> list[Line]:
    found = (_found(result, "stream", "stream") or {}).get("peers", [])
    return [
        {
            "peer": line["arm"],
            "tokens": line["tokens"],
            "step ms": line["step_seconds"]["median"] * 1e3,
            "against": line["against"],
            "nexus is faster": line.get("nexus_speedup", {}).get("median"),
            "equal": line["equals_resident"],
        }
        for line in found
    ]


def _decoding(result: Line) -> list[Line]:
    return [
        {
            "what": f"{line['what']} {line['shape'][0]} x {line['shape'][1]}",
            "us": line["seconds"]["median"] * 1e6,
            "call us": line["call_seconds"] * 1e6,
            "GB/s": line["gbps"]["median"],
            "copy GB/s": line["copy_gbps"]["median"],
            "of copy": line["share_of_copy"]["median"],
            "bitsandbytes / nexus": line.get("bitsandbytes_ratio", {}).get("median"),
        }
        for line in _found(result, "quant", "decode") or []
    ]


def _products(result: Line) -> list[Line]:
    return [
        {
            "what": f"nf4_linear {line['shape'][0]} x {line['shape'][1]}",
            "rows": line["num_rows"],
            **{name: taken["median"] * 1e6 for name, taken in line["seconds"].items()},
            "call": line["call_seconds"] * 1e6,
            "packed GB/s": line["packed_gbps"],
            "dense / nexus": line["dense_ratio"]["median"],
            "decoded / nexus": line["decoded_ratio"]["median"],
        }
        for line in _found(result, "quant", "linear") or []
    ]


def _compiled(result: Line) -> list[Line]:
    return [
        {
            "blocks": line["arm"],
            "tokens": line["tokens"],
            "step ms": line["step_seconds"]["median"] * 1e3,
            "eager / this": line["eager_ratio"]["median"],
            "first step s": line["first_step_seconds"],
            "graphs skipped": line["cudagraph_skips"],
        }
        for line in _found(result, "compile", "compile") or []
    ]


def _target(line: Line) -> Line:
    verdict = {True: "met", False: "NOT MET", None: "not judged"}[line["met"]]
    return {k: line[k] for k in ("target", "wanted", "got")} | {"": verdict, "at": line["at"]}
