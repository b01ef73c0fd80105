"""The command `tts-kernels report`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tts_kernels.errors import fail

from . import claim, figures, measured, readme, sections
from .checks import check_number
from .economics_command import add_comparison_arguments, comparison_of
from .options import (
    add_common_arguments,
    add_examples,
    add_trace_arguments,
    amount_of,
    check_output,
    curves_of,
    device_of,
    model_named,
    money_regime,
    price_of,
)
from .page import page
from .query import REGIMES
from .scenario import Scenario, scenarios
from .sections import Section, Study
from .traces import Traces, synthetic

EXAMPLES = """examples:
  tts-kernels report
  tts-kernels report --output b200.html --figures figures --hardware b200
  tts-kernels report --traces samples.jsonl --model qwen3-8b --price '2 USD'
  tts-kernels report --traces synthetic --model qwen3-8b --price '2 USD' --train-cost '14 USD' \\
      --internal-accuracy 0.6
  tts-kernels report --profile profile.json
  tts-kernels report --readme README.md
"""
SYNTHETIC = "synthetic"
TITLE = "What a query costs"
INTRO = (
    "N candidates for a query and the verifier that picks among them, on one device. V0 copies the prompt per "
    "candidate, V1 stores it once and reads it for each, V2 (these kernels) reads it once per step and verifies each "
    "distinct token once. Compare V2 with V1. The control, a short prompt with long private chains of thought, is "
    "shown like the others: sharing buys nothing there.",
    "Figures are a model, a roofline op by op, unless their caption says that they were measured. Every figure has its "
    "numbers in a table below it.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_examples(parser, EXAMPLES)
    add = parser.add_argument
    add("--output", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default %(default)s)")
    add("--figures", metavar="FOLDER", type=Path, help="write each figure there as SVG and PNG, too")
    add("--scenario", metavar="NAME", action="append", help="an id, a name, or a JSON file; again for several "
        "(default: all)")  # fmt: skip
    add("--profile", metavar="FILE", action="append", default=[], help="measured, as `tts-kernels profile --json` "
        "writes it; again for several")  # fmt: skip
    add("--claim", metavar="FILE", type=Path, help="a record of benchmarks/reasoner: what internal and external "
        "scaling gave a small reasoner")  # fmt: skip
    add_common_arguments(parser)
    add_trace_arguments(parser)
    add("--model", metavar="NAME", help="of the traces: a preset or the path of a config.json")
    add("--prompt", type=int, help="tokens of the prompts, where the traces do not say")
    add_comparison_arguments(parser, required=False)
    add(
        "--readme",
        metavar="FILE",
        type=Path,
        help="in place of a page: rewrite the figure and the table of costs of this README, or, beside --claim, those "
        "of the claim",
    )


def main(args: argparse.Namespace) -> int:
    """Write the page, after every figure as far as it has come. Exit status 0; 130 where it was interrupted."""
    hardware, efficiency = device_of(args)
    study = Study([Scenario.load(name) for name in args.scenario or []] or scenarios(), hardware, efficiency)
    record = claim.read(args.claim) if args.claim else None
    if args.readme:
        for path in claim.write(args.readme, record) if record else readme.write(args.readme, study):
            print(f"wrote {path}")
        return 0
    check_output(args.output)
    figures.new_figure(1, 1, "")  # without matplotlib it ends here
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
    steps = steps_of(args, study, record)
    made: list[Section] = []
    rendered: dict[str, str] = {}

    def write(reason: str) -> None:
        rest = [Section(name, title, "", reason) for name, title, _ in steps[len(made) :]]
        _replace(args.output, page(f"{TITLE}: {hardware.name}", INTRO, [*made, *rest], rendered))

    status = 0
    try:
        for i, (name, title, make) in enumerate(steps, 1):
            begin = time.perf_counter()
            print(f"[{i}/{len(steps)}] {title} .. ", end="", file=sys.stderr, flush=True)
            section = make()
            if args.figures and section.figure:
                (args.figures / f"{name}.svg").write_bytes(section.svg)
                (args.figures / f"{name}.png").write_bytes(figures.image(section.figure, "png"))
            made.append(section)
            write("Not made yet.")
            print(f"{time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        write("The run was interrupted before this figure was made.")
        status = 130
    print(f"{sum(s.figure is not None for s in made)} figures in {args.output}")
    for section in made:
        if section.missing:
            print(f"no figure {section.name}: {section.missing}")
    return status


def steps_of(
    args: argparse.Namespace, study: Study, record: dict | None
) -> list[tuple[str, str, Callable[[], Section]]]:
    """(name, title, function that makes it) of each section. Arguments are checked here, before anything is drawn."""
    runs = measured.read_profiles(args.profile)
    steps = [("headline", "What sharing buys", lambda: sections.headline(study, measured.points(runs)))]
    if runs:
        steps.append(("measured", "Measured beside modelled", lambda: measured.section(runs)))
    if record:
        steps.append(("claim", "Internal and external scaling, measured", lambda: claim.section(record)))
    steps.append(("growth", "What the N-th candidate adds: m(N)", lambda: sections.growth(study)))
    for regime in REGIMES:
        title = f"Where the time goes, {regime}"
        steps.append((f"parts-{regime}", title, lambda regime=regime: sections.parts(study, regime)))
    traces = _traces(args)
    steps.append(("accuracy", "Accuracy against the cost of a query", _accuracy_step(args, study, traces)))
    steps.append(("break-even", "Training once or sampling every time", _break_even_step(args, study, traces)))
    return steps


def _traces(args: argparse.Namespace) -> Traces | None:
    if not args.traces:
        return None
    price_of(args)
    if not args.model:
        fail("--model", "the model that the samples are of", "none")
    model_named(args.model)
    return synthetic() if args.traces == SYNTHETIC else Traces.read(args.traces)


def _accuracy_step(args: argparse.Namespace, study: Study, traces: Traces | None) -> Callable[[], Section]:
    name, title = "accuracy", "Accuracy against the cost of a query"
    if traces is None:
        return lambda: Section(
            name, title, "", "Accuracies come from scored samples, and there are none: --traces FILE --model NAME "
            "--price '2 USD' shows them; --traces synthetic shows an invented set, marked as such."
        )  # fmt: skip
    price, regime = price_of(args), money_regime(args)
    return lambda: sections.accuracy(
        study, curves_of(args, traces, study.hardware, study.efficiency, price), traces, args.traces,
        args.method or "best_of_n", args.model, regime, price.currency,
    )  # fmt: skip


def _break_even_step(args: argparse.Namespace, study: Study, traces: Traces | None) -> Callable[[], Section]:
    name, title = "break-even", "Training once or sampling every time: break-even"
    needed = {"--train-cost": args.train_cost, "--price": args.price, "--internal-accuracy": args.internal_accuracy}
    if traces is None:
        needed["--external-accuracy (or --traces)"] = args.external_accuracy
    lacking = [option for option, value in needed.items() if value is None]
    if lacking:
        return lambda: Section(
            name, title, "", "A break-even is stated at equal accuracy only and nothing of it is assumed: it needs "
            f"{', '.join(lacking)}."
        )  # fmt: skip
    for option in ("internal", "external"):
        accuracy = getattr(args, f"{option}_accuracy")
        if accuracy is not None:
            check_number(f"--{option}-accuracy", accuracy, least=0, most=1)
    regime = money_regime(args)
    amount_of("--train-cost", args.train_cost, price_of(args))
    for side in (args.internal, args.external):
        Scenario.load(side)

    def make() -> Section:
        try:
            found, internal, external = comparison_of(args, study.hardware, study.efficiency, traces)
        except ValueError as refusal:
            if not str(refusal).startswith("external_accuracy:"):  # which does not reach the internal one
                raise
            return Section(name, title, "", f"Refused: {refusal}.")
        invented = traces is not None and sections.is_synthetic(traces)
        return sections.break_even(study, found, internal, external, regime, invented)

    return make


def _replace(path: Path, text: str) -> None:
    """All of it, or the file stays as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
