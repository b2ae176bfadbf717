"""Random networks of ``tests/fuzz`` through the whole path: each ends right, refused before training, or as a fault."""

from __future__ import annotations

from experiments.hardening.trials import FAULT, REFUSED, RIGHT, Outcome, forget, parser, run
from tests.fuzz.networks import network
from tests.fuzz.oracle import outcome

#: Networks, those in a line of the results, and seconds for each.
COUNT, BATCH, LIMIT = 300, 50, 120.0


def trial(seed: int) -> Outcome:
    """One network; every fifth is written as ONNX, too.

    Args:
        seed: makes the network.
    """
    found = outcome(network(seed), export=seed % 5 == 0)
    if found.verdict == "fault":
        return FAULT, f"{found.stage}: {found.reason}"
    return (RIGHT if found.verdict == "right" else REFUSED), ""


def main() -> None:
    """Run all networks, or one."""
    arguments = parser(__doc__, ["network"]).parse_args()
    if arguments.anew:
        forget(["network"])
    if arguments.seed is not None:
        print(network(arguments.seed))
        print(trial(arguments.seed))
    else:
        print(f"network: {dict(run('network', trial, COUNT, BATCH, LIMIT))}")


if __name__ == "__main__":
    main()
