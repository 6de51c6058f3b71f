"""`python -m benchmarks.gpu`."""

from __future__ import annotations

import click

from benchmarks import figures, options
from benchmarks.gpu import run
from benchmarks.gpu.report import Results, report
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_cli.signals import raised


@options.program
@click.option("--only", default="", metavar="PART[,…]", help="Of the parts that --help lists.")
@options.option(
    "--scale", type=click.FloatRange(0.0001, 1), default=1.0, help="How many of the tensors."
)
@options.rounds(7)
@options.option(
    "--kills", type=click.IntRange(min=1), default=50, help="Sources that the part kills kills."
)
@options.option(
    "--loads", type=click.IntRange(min=1), default=200, help="Loads of the part updates."
)
@click.option(
    "--profile", is_flag=True, help="Show which steps and functions of load() take how long."
)
def command(
    only: str,
    scale: float,
    rounds: int,
    kills: int,
    loads: int,
    profile: bool,
    as_json: bool,
) -> None:
    """From GPU to GPU of one host: needs two, and NVLink or PCIe between them. Takes minutes.

    \b
    Parts: the sets of tensors
      mixed          256 of 32 MiB and 2,000 of 8 KiB
      large          256 of 32 MiB
      llama-70b-tp8  what a rank of Llama 3 70B holds at tp=8, bf16
      small          20,000 of 16 KiB
    of which load() over each protocol takes turns with torch's copies and naive calls of Mooncake;
    and
      nccl           send and receive, for each set
      host           from an arena, from pinned memory and from a file, for mixed
      failover       two sources, one of which is killed
      fan-out        several processes load from one
      reshard        tp 2→1 and 1→2, by rows and by columns
      kills          sources that are killed at a random moment within a load
      updates        loads beside a source that updates all the time
    """

    parts = {part for part in only.split(",") if part}
    if parts - set(run.PARTS):
        raise click.UsageError(
            f"--only {only!r} is not valid: it is some of {', '.join(run.PARTS)}"
        )
    devices = run.gpus()
    extent = run.Extent(parts, scale, rounds, kills, loads, profile)
    results = Results()
    with engine_log(), raised():
        try:
            run.measure(results, devices, extent, figures.say)
        finally:  # minutes of a GPU's time are not lost with what failed after them
            if results.rows or results.counts:
                report(results, as_json, profile)


if __name__ == "__main__":
    main(command, "benchmarks.gpu")
