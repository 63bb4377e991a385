"""DeepSpeed's launcher on one node of a Slurm allocation: the command of srun's task.

python -m ochat_train.launch.node HOSTS [options of the launcher]

HOSTS is the text of a hostfile, since not every node may see a file of the first one.
"""

import os
import subprocess
import sys
import tempfile


def main() -> None:
    """Run the launcher on the node that SLURM_NODEID names; exits with its code."""
    hosts, *options = sys.argv[1:]
    with tempfile.NamedTemporaryFile("w") as hostfile:
        hostfile.write(hosts)
        hostfile.flush()
        nodes = ["--no_ssh", "--node_rank", os.environ["SLURM_NODEID"], "--hostfile", hostfile.name]
        done = subprocess.run([sys.executable, "-m", "deepspeed.launcher.runner", *nodes, *options])
    sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


if __name__ == "__main__":
    main()
