"""What was measured beside what was modelled, way by way."""

from __future__ import annotations

from collections.abc import Mapping

from tts_kernels.cost import PARTS
from tts_kernels.cost.formulas import kv_saving
from tts_kernels.cost.table import markdown, number, ratio
from tts_kernels.verifier import Verifier

from .ways import WAYS, Profile

SAME_SCORE = 1e-3  # in float32
COUNTED = [part for part in PARTS if part != "host_gap"]
NOTES = """\
ceiling   what a part takes at least on this device, forward by forward: max(bytes / bandwidth, FLOPs / rate)
measured  wall time, one run; the device is waited for around every part. Keys of the prefix and of the suffix, and both
          halves of a verifier's forward, run in one launch and share its time in the ratio of their ceilings
host_gap  what is outside of all other parts: Python, plans, text, transformers' bookkeeping. It has no byte counts
counted   operands of the calls: matrices, KV, logits, as in the model. Activations are not counted, nor what a library
          copies besides (transformers concatenates its cache in every step: the time of that is decode attention's)"""


def order(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    return {way: profiles[way] for way in WAYS if way in profiles}


def not_alike(profile: Profile, verifier: Verifier) -> dict[str, str]:
    """Parts in which model and count are known not to describe the same thing, and why."""
    cost, work, reasons = profile.cost, profile.cost.workload, {}
    layers = "a mixture of experts: which matrices a forward reads is not seen by the count"
    if cost.model.experts:
        reasons |= dict.fromkeys(("prefill_prefix", "decode_linear", "straggler_idle"), layers)
    if work.verifier_model.experts:
        reasons |= dict.fromkeys(("prm_prefix", "prm_suffix"), layers)
    if min(map(len, profile.ids)) < 2:
        parts = [part for part in COUNTED if part.startswith(("decode", "head", "straggler"))]
        reasons |= dict.fromkeys(parts, "a candidate ended with its first token; modelled are two at least")
    if profile.way == "tree" and profile.verifier_forwards > 1:
        reasons |= dict.fromkeys(
            ("prm_prefix", "prm_suffix"), f"{profile.verifier_forwards} forwards of the verifier; modelled is one"
        )
    head = verifier.head
    usual = len(head.w2) == (1 if work.verifier_head == "linear" else 2) and head.w2.dtype == verifier.models[0].dtype
    if head.w1 is not None:
        usual = usual and head.w1.shape[0] == head.dim
    if not usual and (profile.way == "tree" or work.verifier_head != "vocab"):
        reasons["prm_head"] = f"a head {tuple(head.w2.shape)} in {head.w2.dtype}, not the one modelled"
    return reasons


def unequal(profile: Profile) -> dict[str, str]:
    """Parts whose modelled bytes or FLOPs are not those counted: to the byte, where rounding leaves one whole."""
    found = {}
    for name, part in profile.cost.parts.items():
        if name in COUNTED and abs(part.bytes - part.measured_bytes) >= 0.5:
            found[name] = f"{part.bytes:,.0f} bytes modelled, {part.measured_bytes:,.0f} counted"
        elif name in COUNTED and abs(part.flops - profile.flops[name]) >= 0.5:
            found[name] = f"{part.flops:,.0f} FLOPs modelled, {profile.flops[name]:,.0f} counted"
    return found


def failures(profiles: Mapping[str, Profile], verifier: Verifier, same: Mapping) -> list[str]:
    """What is wrong: counts that are not the model's though they should be, and answers that differ."""
    wrong = [
        f"{way}: {part}: {what}"
        for way, profile in profiles.items()
        for part, what in unequal(profile).items()
        if part not in not_alike(profile, verifier)
    ]
    wrong += [f"the {what} of the ways differ" for what in ("tokens", "choice") if not same[f"{what}_equal"]]
    if not same["score_difference"] < SAME_SCORE:
        wrong.append(f"the scores of the ways differ, by up to {same['score_difference']:.1e}")
    return wrong


def seconds_table(profiles: Mapping[str, Profile]) -> str:
    """Ceiling, measured, and their ratio, for each part and way."""
    header = ["part"]
    for way in profiles:
        header += [f"{way}: ceiling, s", "measured, s", "ratio"]
    rows = []
    for name in PARTS:
        rows.append([name])
        for profile in profiles.values():
            part = profile.cost.parts[name]
            rows[-1] += cells(part.ceiling_seconds, part.measured_seconds)
    rows.append(["sum"])
    for profile in profiles.values():
        rows[-1] += cells(profile.cost.ceiling_seconds, profile.cost.seconds)
    return markdown(header, rows)


def cells(ceiling: float, measured: float) -> list[str]:
    return [number(ceiling), number(measured), ratio(measured / ceiling) if ceiling else ""]


def counts_table(profiles: Mapping[str, Profile]) -> str:
    """Counted bytes and FLOPs of each part and way."""
    header = ["part", *(f"{way}, MB" for way in profiles), *(f"{way}, GFLOP" for way in profiles)]
    moved = {name: [p.cost.parts[name].measured_bytes / 1e6 for p in profiles.values()] for name in COUNTED}
    flops = {name: [p.flops[name] / 1e9 for p in profiles.values()] for name in COUNTED}
    rows = [[name, *map(number, moved[name] + flops[name])] for name in COUNTED]
    sums = [sum(column) for table in (moved, flops) for column in zip(*table.values())]
    return markdown(header, [*rows, ["sum", *map(number, sums)]])


def summary(profiles: Mapping[str, Profile], verifier: Verifier, same: Mapping) -> str:
    lines = []
    if "tree" in profiles and len(profiles) > 1:
        ours = profiles["tree"].cost
        work, suffix = ours.workload, sum(ours.workload.suffixes[0]) / ours.workload.n
        for way, profile in profiles.items():
            if way != "tree":
                cost = profile.cost
                lines.append(
                    f"{way} over tree: whole query {ratio(cost.seconds / ours.seconds)} measured, "
                    f"{ratio(cost.ceiling_seconds / ours.ceiling_seconds)} at the ceilings; KV read in decode "
                    f"{ratio(kv_read(profile) / kv_read(profiles['tree']))} counted"
                )
        prompt = work.prompts[0]
        lines.append(
            f"sharing P = {prompt} tokens between N = {work.n} candidates of S = {suffix:.4g} saves at most "
            f"N(2P+S)/(2P+NS) = {ratio(kv_saving(work.n, prompt, suffix))} of the KV reads"
        )
    used = [f"{way} {number(p.joules)} J" for way, p in profiles.items() if p.joules is not None]
    lines += ["energy of the GPU: " + ", ".join(used)] if used else []
    apart = {f"{part}: {why}" for p in profiles.values() for part, why in not_alike(p, verifier).items()}
    lines.append("modelled bytes and FLOPs equal counted ones exactly" + (", but for" if apart else ", in all parts"))
    lines += [f"  {line}" for line in sorted(apart)]
    if len(profiles) > 1:
        lines.append(f"tokens equal: {yes(same['tokens_equal'])}, choice equal: {yes(same['choice_equal'])}, largest "
                     f"difference of a score: {same['score_difference']:.1e}")  # fmt: skip
    return "\n".join(lines)


def kv_read(profile: Profile) -> float:
    parts = profile.cost.parts
    return parts["decode_attn_prefix"].measured_bytes + parts["decode_attn_suffix"].measured_bytes


def yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def to_dict(profile: Profile, verifier: Verifier) -> dict:
    """Plain data, for JSON: that of the QueryCost, with `counted_flops` beside `measured_bytes` in each part."""
    cost = profile.cost.to_dict()
    for name, part in cost["parts"].items():
        part["counted_flops"] = profile.flops[name]
    return {
        "title": WAYS[profile.way],
        "wall_seconds": profile.wall_seconds,
        "joules": profile.joules,
        "new_tokens": [len(ids) for ids in profile.ids],
        "steps": [len(candidate.steps) for candidate in profile.result.candidates],
        "choice": profile.result.choice,
        "verifier_tokens": profile.result.cost.verifier_tokens,
        "verifier_forwards": profile.verifier_forwards,
        "unequal": unequal(profile),
        "not_alike": not_alike(profile, verifier),
        "cost": cost,
    }
