"""A plan for people."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def table(found: Json, title: str) -> str:
    """The plan as text."""
    gpu, asked, known, pilot = found["gpus"], found["questions"], found["lengths"], found["pilot"]
    head = (
        _measured(pilot)
        if pilot
        else [
            f"an estimate from its data sheet ({gpu['memory'] / 1e9:g} GB, {gpu['bandwidth'] / 1e12:g} TB/s, "
            f"{gpu['peak'] / 1e12:g} TFLOP/s bf16) and assumed efficiencies (docs/plan.md), nothing was measured",
            "tokens each: " + ", ".join(f"{name} {tokens:g}" for name, tokens in known.items()) + " (change with --tokens)",
        ]
    )
    lines = [
        f"{title} on " + (f"{gpu['count']} × {gpu['kind']}" if gpu["count"] else "CPUs alone"),
        *head,
        "",
        "placement: " + ", ".join(f"{key} {p['count']} × {p['gpus']:g} GPUs" for key, p in found["placement"].items() if p),
        f"questions: {asked['train']:,} taught, {asked['show']} shown, {asked['select']} select, {asked['tests']:,} of tests",
        "",
    ]
    rows = [["round", "stage", "GPUs", "loading s", "wall", "GPU-hours", "idle GPU-hours", "teacher tokens"]]
    for entry in found["rounds"]:
        for name, figures in entry["stages"].items():
            rows.append(_row(str(entry["round"]), name, figures, entry["teacher_tokens"]))
        if "rationales" not in entry["stages"]:
            rows.append([str(entry["round"]), "rationales", "endpoint", "", "", "", "", _spent(entry["teacher_tokens"])])
    if found["tests"]:
        rows.append(_row("end", "tests", found["tests"], {}))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    hours, idle = found["gpu_hours"], found["idle_gpu_hours"]
    lines += ["", f"in all: {hours:,.1f} GPU-hours and {idle:,.1f} idle ones, {found['wall_hours']:,.1f} hours"]
    spent = {kind: amount for kind, amount in found["money"].items() if amount is not None}
    lines += ["money: " + ", ".join(f"{amount:,.2f} on {kind}" for kind, amount in spent.items())] if spent else []
    lines += [f"note: {note}" for note in found["notes"]]
    lines += ["", "memory of one GPU, GB:"] if found["memory"] else []
    for key, fit in found["memory"].items():
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in fit["bytes"].items() if size)
        verdict = "fits" if fit["fits"] else "DOES NOT FIT"
        lines.append(f"  {key}: {sum(fit['bytes'].values()) / 1e9:.1f} of {fit['limit'] / 1e9:.1f}, {verdict} ({parts})")
    lines += _compared(found["templates"]) if found["templates"] else []
    return "\n".join([*lines, "", "formulas:", *(f"  {formula}" for formula in found["formulas"])])


def _measured(pilot: Json) -> list[str]:
    *made, training = pilot["stages"].values()
    return [
        f"measured on this machine: {pilot['questions']} questions, one replica of each engine in {pilot['seconds']:.0f} s; "
        "where fewer requests were in flight than can be, the engine was not full and a run is faster than this",
        *(
            f"  {name}: {each['requests']} requests of {each['prompt']:,.1f} tokens ({each['cached']:,.1f} cached), "
            f"{each['completion']:,.1f} written, {each['good']:.0%} good; started in {each['start_seconds']:.1f} s; "
            f"{each['tokens_per_second']:,.0f} tokens/s with at most {each['in_flight']} of {each['room']} requests in flight"
            for name, each in zip(pilot["stages"], made, strict=False)
        ),
        f"  training: {training['steps']} steps, {training['tokens']:,} tokens in {training['work_seconds']:.1f} s on "
        f"{training['workers']} workers; {training['lessons_per_question']:.0%} of the questions gave a lesson",
    ]


def _row(k: str, name: str, figures: Json, tokens: Json) -> list[str]:
    hours = f"{figures['gpu_hours']:,.2f}", f"{figures['idle_gpu_hours']:,.2f}"
    spent = _spent(tokens) if name == "rationales" else ""
    return [k, name, f"{figures['gpus']:g}", f"{figures['load_seconds']:.0f}", _time(figures["wall_seconds"]), *hours, spent]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _spent(tokens: Json) -> str:
    return (
        f"{tokens['prompt'] / 1e6:,.1f} M in ({tokens['cached'] / 1e6:,.1f} M cached), {tokens['completion'] / 1e6:,.1f} M out"
    )


def _compared(found: Json) -> list[str]:
    lines = ["", f"the teacher's part of round {found['round']}, by template:"]
    for name in ("prefix", "paper"):
        part = found[name]
        lines.append(
            f"  {name}: {part['prompt']:,.0f} prompt tokens a question, {part['cached']:,.0f} of them cached; "
            f"prefill {part['prefill_seconds'] * part['gpus'] / 3600:,.1f} + decoding "
            f"{part['decode_seconds'] * part['gpus'] / 3600:,.1f} + loading = {part['gpu_hours']:,.1f} GPU-hours"
        )
    ours, theirs = found["prefix"], found["paper"]
    times = theirs["gpu_hours"] / ours["gpu_hours"]
    lines.append(
        f"  why: in the paper's layout the question comes first, so its {theirs['shown']} examples are read anew for every "
        f"question, and each request keeps a copy of them: {theirs['batch']:,.0f} decode at a time on a replica, not "
        f"{ours['batch']:,.0f}. {times:.1f} times the GPU-hours"
    )
    if hours := found["reported_gpu_hours"]:
        lines.append(
            f"  the paper reports about {hours:,} GPU-hours (GH200) a round, {hours / theirs['gpu_hours']:,.1f} times this "
            "estimate for its own layout, so the rest is not the layout; how its engine was run and how long its texts are, it "
            "does not say"
        )
    return lines
