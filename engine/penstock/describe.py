"""A Plan as text for people (control path): what `penstock check` prints."""

from __future__ import annotations

from collections.abc import Sequence

from .definitions.durations import window_label
from .functions import mode_of
from .plan import PipelinePlan, Plan

__all__ = ["describe_plan", "text_table", "warnings_of"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows under a header, columns aligned to the left."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [indent + "  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows]]
    lines.insert(1, indent + "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def describe_plan(plan: Plan) -> str:
    """Events, state, views and pipelines of a plan, as aligned tables."""
    parts = [f"app {plan.app}: plan {plan.fingerprint}"]
    parts.append("\nEvents")
    parts.append(
        text_table(
            ["event", "time", "id", "lateness", "max skew", "fields"],
            [
                [
                    e.name,
                    e.fields[e.time].name,
                    e.fields[e.event_id].name if e.event_id is not None else "-",
                    _length(e.options.lateness),
                    _length(e.options.max_skew),
                    ", ".join(f"{f.name}: {f.type}{'?' if f.optional else ''}" for f in e.fields),
                ]
                for e in plan.events.values()
            ],
        )
    )
    if plan.views:
        parts.append("\nFeature views")
        rows = []
        for view in plan.views.values():
            store = plan.stores[view.store]
            for i, output in enumerate(view.outputs):
                rows.append(
                    [
                        view.name if i == 0 else "",
                        f"{view.entity} ({view.event}.{view.key_field})" if i == 0 else "",
                        "yes" if i == 0 and view.include_request_event else "",
                        output.name,
                        output.type,
                        "lifetime" if output.window is None else _length(output.window),
                        {"right": "(T-W, T]", "both": "[T-W, T]", "left": "[T-W, T)"}[output.closed],
                        "-" if output.default is None else repr(output.default),
                        "-" if output.where is None else store.wheres[output.where],
                    ]
                )
        header = ["view", "entity", "request event", "feature", "type", "window", "edges", "default", "where"]
        parts.append(text_table(header, rows))
        parts.append("\nState")
        parts.append(
            text_table(
                ["source", "entity", "columns", "kept", "layout"],
                [
                    [
                        s.event,
                        s.entity,
                        ", ".join(plan.events[s.event].fields[c].name for c in s.columns) or "-",
                        f"for ever: {', '.join(_endless(plan, s.index))}"
                        if s.retention is None
                        else f"{_length(s.retention - s.lateness)} + {_length(s.lateness)}",
                        f"{s.fingerprint:016x}",
                    ]
                    for s in plan.stores
                ],
            )
        )
    for pipeline in plan.pipelines.values():
        parts.append(_pipeline(pipeline))
    return "\n".join(parts)


def _endless(plan: Plan, store: int) -> list[str]:
    """The views for which a store keeps every entity there ever was."""
    return [v.name for v in plan.views.values() if v.store == store and any(o.window is None for o in v.outputs)]


def warnings_of(plan: Plan) -> list[str]:
    """What is allowed and yet seldom meant, each as `place: what, and what would be right`."""
    found = []
    for pipeline in plan.pipelines.values():
        place, own = f'pipeline "{pipeline.name}"', plan.events[pipeline.event]
        if pipeline.on_degraded is None and pipeline.fallback is None:
            found.append(
                f"{place}: an event whose features cannot be known (late, or beyond what state holds) is scored as any "
                'other; say on_degraded="score" if that is meant, or an action'
            )
        for event in dict.fromkeys(plan.views[read.view].event for read in pipeline.reads):
            source = plan.events[event]
            lateness, needed = source.options.lateness, max(source.options.max_skew, own.options.lateness)
            if source is own or lateness >= needed:
                continue
            skew = source.options.max_skew >= own.options.lateness
            what = "its max_skew" if skew else f"the lateness of {own.name}"
            found.append(
                f"{place}: it reads {event}, whose lateness ({_length(lateness)}) is below {what} ({_length(needed)}): "
                f"when {event} runs ahead by more, "
                f'features cannot be known (INVALID); say class {event}(Event, lateness="{_length(needed)}")'
            )
    return found


def _pipeline(pipeline: PipelinePlan) -> str:
    slots = {slot.index: slot for slot in pipeline.slots}
    parts = [f"\nPipeline {pipeline.name} on {pipeline.event}: {len(pipeline.features)} features"]
    rows: list[list[str]] = []
    for read in pipeline.reads:
        rows.append(["read", read.view, f"key {slots[read.key].name}", f"slots {read.first_slot}.."])
    for function in pipeline.functions:
        arguments = ", ".join(slots[i].name for i in function.arguments)
        rows.append(["function", f"{function.name}({arguments})", mode_of(function.definition.mode), function.type])
    for assign in pipeline.experiments:
        experiment = assign.experiment
        arms = ", ".join(f"{arm} {weight:g}" for arm, weight in experiment.arms.items())
        rows.append(["assign", experiment.name, f"unit {experiment.unit}, {experiment.hash}", arms])
    for model in pipeline.models:
        guard = "always"
        if model.guard is not None:
            experiment = pipeline.experiments[model.guard[0]].experiment
            arm = list(experiment.arms)[model.guard[1]] if model.guard[1] >= 0 else "none"
            guard = f"{experiment.name} = {arm}"
        rows.append(["model", model.model.ref, guard, "decides" if model.decides else "scores beside"])
    for step in pipeline.rules:
        rows.append(["rule", step.rule.name, step.rule.when, step.rule.action])
    rows.append(["else", "", "", pipeline.default_action])
    if pipeline.fallback is not None:
        rows.append(["failure", "", "a function or model fails", pipeline.fallback])
    if pipeline.degraded_action is not None:
        rows.append(["degraded", "", "features cannot be known", pipeline.degraded_action])
    parts.append(text_table(["step", "what", "when", "result"], rows))
    parts.append("  features: " + ", ".join(slots[i].name for i in pipeline.features))
    return "\n".join(parts)


def _length(us: int) -> str:
    from datetime import timedelta

    return window_label(timedelta(microseconds=us)) if us else "0"
