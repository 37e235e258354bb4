"""How well does an agent answer? The same as `trace-envs evaluate`, for use beside the other benchmarks.

python -m benchmarks.evaluate --dataset hotpotqa --data-path hotpotqa_train.json --agent oracle
"""

from __future__ import annotations

import sys

from agents.cli import evaluate_command, run_safely

if __name__ == "__main__":
    sys.exit(run_safely(evaluate_command, sys.argv[1:]))
