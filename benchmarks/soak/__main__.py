"""A run under faults, again and again: does it end as the run that was left alone?

    python benchmarks/soak [--faults 1000] [--minutes 120] [--seed 0]

Trains a small model on the quickstart's conversations, round after round, each a whole run from its first step to its
model, until there were so many faults or the time is over. There are three kinds of rounds: two ranks on one host; two
hosts with a rank each; and one to three ranks at changing ZeRO stages. At the end of each every example of every epoch
must have been trained once in the steps that count. Weights and losses must be, bit for bit, those of the run that was
left alone; where the number of ranks changes, they may differ by four times what undisturbed runs of one, two and three
ranks differ from each other. The counts are printed and written to benchmarks/results/.

Hosts are network namespaces and small disks are file systems in memory, for which Linux must allow `unshare`; without
it those faults are left out, and named. Needs psutil.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import orjson

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks, from which its modules are imported


def main() -> None:
    """Disturb, compare, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true", help="print the counts and write no file")
    options = parser.parse_args()
    from soak.hosts import enter_namespaces

    is_inside = enter_namespaces()  # before the imports that take seconds
    from machine import ROOT, describe_machine, write_results
    from soak.rounds import Soak

    results = describe_machine(("torch", "deepspeed", "transformers")) | {"options": vars(options)}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        results |= Soak(Path(name), options.faults, options.minutes, options.seed, is_inside=is_inside).run()
    print(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())
    if not options.no_write:
        write_results("soak", results)
    if results["problems"]:
        sys.exit(f"{len(results['problems'])} problems")


if __name__ == "__main__":
    main()
