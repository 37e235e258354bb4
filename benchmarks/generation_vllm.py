"""The vLLM part of `benchmarks.generation`, for an interpreter that has vLLM: prints a JSON line for each workload.

python -m benchmarks.generation_vllm --workloads groups trees
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from statistics import median

import tyro

from agents.models import SHIPPED, load_tokenizer
from agents.policies.engine_config import EngineConfig
from agents.policies.vllm_policy import VLLMPolicy
from benchmarks import versions
from benchmarks.generation_forest import WORKLOADS, Asked, sample_forest, unique_tokens


@dataclass(frozen=True)
class Args:
    """Settings; see `benchmarks.generation.Args`."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    block_size: int | None = EngineConfig().block_size
    repeats: int = 5
    seed: int = 0


def main(args: Args) -> None:
    """Samples each workload's forest and prints what the engine computed for it."""
    policy = VLLMPolicy(
        SHIPPED["tiny"],
        load_tokenizer("tiny"),
        max_new_tokens=max(WORKLOADS[w].max_new_tokens for w in args.workloads),
        seed=args.seed,
        engine=EngineConfig(block_size=args.block_size),
    )
    with closing(policy):
        for name in args.workloads:
            rows = []
            for repeat in range(args.repeats + 1):  # the first warms up
                # Each forest finds the cache as an update leaves it: empty.
                policy.reset_cache()
                asked, before = Asked(policy), dict(policy.computed)
                forest = sample_forest(asked, WORKLOADS[name], args.seed + repeat)
                computed = {kind: policy.computed[kind] - before[kind] for kind in before}
                rows.append((forest, asked.seconds, computed))
            ratios = [sum(computed.values()) / unique_tokens(forest) for forest, _, computed in rows[1:]]
            forest, _, computed = rows[-1]
            record = {
                "engine": "vllm",
                "workload": name,
                "block_size": args.block_size,
                "unique_tokens": unique_tokens(forest),
                "computed": computed,
                "ratio": median(ratios),
                "all_ratios": ratios,
                "tokens_per_second": median(f.ledger.generated_tokens / s for f, s, _ in rows[1:]),
                "versions": versions("torch", "transformers"),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.generation_vllm"))
