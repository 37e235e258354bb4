"""The training loop: collect a forest, credit its edges, step, let the allocator learn, repeat.

Invariant: everything that influences the next update is in `Trainer.state_dict`; wall-clock influences nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agents.advantages import ESTIMATORS
from agents.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from agents.config import TrainConfig, check_resumable, load_config, resolve, to_dict
from agents.display import TrainingDisplay
from agents.evaluate import evaluate, make_env, make_vector
from agents.learner import LogProbs, policy_step
from agents.losses import Clip
from agents.models import load_model
from agents.policies import TransformersPolicy, collect
from agents.runlog import CONFIG, RunLog, read_jsonl
from allocation import Forest, Ledger, Root, Tree, TreeAllocationWrapper, make_allocator, make_predictor
from allocation.methods.predicted import PredictedAllocator
from allocation.tree import tree_record

logger = logging.getLogger(__name__)


class TaskDeck:
    """Deals tasks in random order, each once before any comes again, and never one twice in one call.

    Args:
        task_ids: The tasks.
    """

    def __init__(self, task_ids: Sequence[str]):
        self._task_ids = list(task_ids)
        self._order = np.zeros(0, dtype=np.int64)

    def __call__(self, rng: np.random.Generator, count: int) -> list[Root]:
        """Returns the next `count` tasks, or all of them if there are fewer."""
        count = min(count, len(self._task_ids))
        if len(self._order) < count:
            fresh = rng.permutation(len(self._task_ids))
            # What this call still has from the last round comes late in the next one.
            again = np.isin(fresh, self._order)
            self._order = np.concatenate([self._order, fresh[~again], fresh[again]])
        taken, self._order = self._order[:count], self._order[count:]
        return [Root(int(rng.integers(2**31)), {"task_id": self._task_ids[i]}) for i in taken]

    def state_dict(self) -> dict[str, Any]:
        """Returns what is left of the deck."""
        return {"order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._order = np.asarray(state["order"], dtype=np.int64)


class _Interrupt:
    """Turns the first Ctrl-C into a wish, so that what is in progress is not lost; the second one stops at once.

    Attributes:
        asked: Whether there was a Ctrl-C.
        phase: What is in progress, for the message.
    """

    def __init__(self, display: TrainingDisplay):
        self.asked = False
        self.phase = "update"
        self._display = display
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        then = " and writing a checkpoint" if self.phase == "update" else "; its checkpoint is written"
        self._display.message(f"interrupted: finishing this {self.phase}{then}; again to stop at once")


class Trainer:
    """One run.

    Args:
        config: Its settings.
        resume: Go on from the latest checkpoint of the run's directory.

    Attributes:
        config: The settings, resolved.

    Raises:
        ValueError: Settings are unknown or do not go together, or differ from those of the run to go on with.
        FileExistsError: There is a run of that name, and it is not to be resumed.
        FileNotFoundError: There is no run to go on with, or no such model.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False):
        self.config = config = resolve(config, resume=resume)
        for name in config.ignored:
            logger.warning("settings of %s are ignored: the allocator is %s", name, config.allocator)
        self.credit = ESTIMATORS[config.estimator]
        if config.threads:
            torch.set_num_threads(config.threads)
        self.update = 0
        self.total = Ledger()
        # Whether the weights may already be those of the update in progress.
        self._learning = False
        self._resumed = resume
        checkpoint = self._latest() if resume else None
        if resume and (config.directory / CONFIG).exists():
            check_resumable(config, load_config(config.directory / CONFIG))
        source = config.model if checkpoint is None else str(checkpoint)
        self.model, self.tokenizer = load_model(source, device=config.device, dtype="float32")
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        gains = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([{"params": matrices}, {"params": gains}], weight_decay=config.weight_decay)
        self.logprobs = LogProbs(self.model)
        self.env_kwargs = {**config.env.kwargs(), "split": config.train_split}
        self.allocator = make_allocator(
            config.allocator,
            predictor=make_predictor(
                config.predictor, feature_dim=int(self.model.config.hidden_size), seed=config.seed
            ),
            group_size=config.group_size,
            config=config.trace_plus if config.allocator == "trace_plus" else config.trace,
        )
        self.policy = TransformersPolicy(
            self.model,
            self.tokenizer,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            entropy=self.allocator.uses_entropy,
        )
        self.rng = np.random.default_rng([config.seed, 0x7AC3])
        with contextlib.ExitStack() as opened:
            envs = opened.enter_context(
                contextlib.closing(make_vector(config.env_id, config.num_envs, self.env_kwargs))
            )
            self.deck = TaskDeck(envs.envs[0].unwrapped.task_ids())  # type: ignore[attr-defined]
            self.envs = TreeAllocationWrapper(
                envs,
                allocator=self.allocator,
                budget=config.budget,
                roots=self.deck,
                encode=self.policy.encode if isinstance(self.allocator, PredictedAllocator) else None,
            )
            self.log = opened.enter_context(RunLog(config.directory, resume=resume, trackers=config.trackers))
            if checkpoint is not None:
                self._load(checkpoint)
            self.log.write_config(to_dict(config))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes the environments and the log."""
        self._opened.close()

    # One update, as the paper has it.

    def train_step(self) -> dict[str, Any]:
        """Collects one forest and learns from it; returns the record for the log."""
        start = time.perf_counter()
        forest = collect(self.envs, self.policy, seed=int(self.rng.integers(2**31)))
        rolled = time.perf_counter()
        credits = [self.credit(tree, std=self.config.advantage_std) for tree in forest]
        for group, lr in zip(self.optimizer.param_groups, (self.config.lr, self.config.gain_lr), strict=True):
            group["lr"] = lr * self._schedule()
        self._learning = True
        losses = policy_step(
            self.model,
            self.optimizer,
            forest,
            credits,
            aggregation=self.config.aggregation,
            clip=Clip(self.config.clip_low, self.config.clip_high),
            epochs=self.config.epochs,
            max_grad_norm=self.config.max_grad_norm,
            micro_tokens=self.config.micro_tokens,
            temperature=self.config.temperature,
            logprobs=self.logprobs,
        )
        self.policy.reset_cache()
        learned = time.perf_counter()
        allocation = self.allocator.update(forest)
        self.update += 1
        self.total.add(forest.ledger)
        record = {"update": self.update, **batch_figures(forest), **losses, **allocation}
        record |= {f"time/{k}": v for k, v in forest.ledger.seconds.items()}
        end = time.perf_counter()
        record |= {"time/rollout": rolled - start, "time/update": learned - rolled, "time/predictor": end - learned}
        for tree, credit in list(zip(forest, credits, strict=True))[: self.config.log_trees]:
            self.log.log_tree({"update": self.update, **_task_record(tree), **tree_record(tree, credit.advantage)})
        return record

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trains to the end; returns the evaluations before and after.

        The first interrupt (Ctrl-C) lets the update or evaluation in progress finish and raises; a second one stops at once.
        Whatever ends a run, and wherever, the checkpoint is one of a finished update, and the resumed run does all that is
        missing: a checkpoint is written before every evaluation, and one that is due and not in the log is made first.

        Raises:
            KeyboardInterrupt: The run was interrupted.
        """
        history = read_jsonl(self.log.metrics_path) if self.log.metrics_path.exists() else []
        evaluations = [r for r in history if "eval/accuracy" in r]
        with TrainingDisplay(self.config.updates, history=history) as display, _Interrupt(display) as interrupt:
            if not self._resumed:
                self.save()
            while True:
                if self._evaluation_due() and all(r["update"] != self.update for r in evaluations):
                    where = "start" if not self.update else "end" if self.update >= self.config.updates else "model"
                    display.message(f"evaluating the {where} on the {self.config.eval_split} split")
                    interrupt.phase = "evaluation"
                    evaluations.append(self._evaluate())
                    display.update(evaluations[-1])
                    interrupt.phase = "update"
                    if interrupt.asked:
                        raise KeyboardInterrupt
                if self.update >= self.config.updates:
                    break
                begin, self._learning = self._streams(), False
                try:
                    record = self.train_step()
                except BaseException:
                    if not self._learning:
                        self._set_streams(begin)
                        self.save()
                    raise
                self.log.log(record)
                display.update(record)
                due = self.update % self.config.checkpoint_every == 0 or self._evaluation_due()
                if due or interrupt.asked:
                    self.save()
                if interrupt.asked:
                    raise KeyboardInterrupt
        return evaluations[0], evaluations[-1]

    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        at_an_end = self.update == 0 or self.update >= self.config.updates
        return at_an_end or (every > 0 and self.update % every == 0)

    def _schedule(self) -> float:
        """Returns the factor on the step sizes."""
        config = self.config
        rise = min(1.0, (self.update + 1) / max(config.lr_warmup, 1))
        # One batch says little about the gradient, so the last updates must be small for the noise of the first to average out.
        fall = 1.0 if config.lr_schedule == "constant" else 1 - self.update / config.updates
        return rise * fall

    def _evaluate(self) -> dict[str, Any]:
        start = time.perf_counter()
        # A policy of its own: evaluation must not move the generator that training samples from.
        policy = TransformersPolicy(
            self.model,
            self.tokenizer,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed + 1,
        )
        kwargs = {**self.env_kwargs, "split": self.config.eval_split}
        record = evaluate(
            policy, self.config.env_id, kwargs, eval_task_ids(self.config.env_id, kwargs, self.config.eval_per_hop)
        )
        record = {"update": self.update, **record, "time/evaluation": time.perf_counter() - start}
        self.log.log(record)
        return record

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next update depends on, the model's weights apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "allocator": self.allocator.state_dict(),
            "ledger": self.total.counts(),
            **self._streams(),
        }

    def _streams(self) -> dict[str, Any]:
        """Returns what collecting a forest moves on: generators and the deck."""
        return {
            "deck": self.deck.state_dict(),
            "rng": self.rng.bit_generator.state,
            "sampling": self.policy.generator.get_state(),
        }

    def _set_streams(self, state: dict[str, Any]) -> None:
        self.deck.load_state_dict(state["deck"])
        self.rng.bit_generator.state = state["rng"]
        self.policy.generator.set_state(state["sampling"])

    def save(self) -> None:
        """Writes a checkpoint."""
        save_checkpoint(
            self.config.directory / "checkpoints",
            self.update,
            self.model,
            self.tokenizer,
            self.state_dict(),
            keep=self.config.keep_checkpoints,
        )

    def _latest(self) -> Any:
        found = list_checkpoints(self.config.directory / "checkpoints")
        if not found:
            raise CheckpointError(
                f"--resume: {self.config.directory / 'checkpoints'} holds no checkpoint; start the run without --resume"
            )
        return found[-1]

    def _load(self, checkpoint: Any) -> None:
        self.update, state = load_checkpoint(checkpoint)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.allocator.load_state_dict(state["allocator"])
            self._set_streams(state)
            self.total = Ledger(**state["ledger"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {checkpoint} does not fit the settings of the run or this release "
                f"({type(error).__name__}: {error}); resume with the settings in {self.config.directory / CONFIG}"
            ) from error
        self.log.truncate_after(self.update)


def _task_record(tree: Tree) -> dict[str, Any]:
    """Returns what the log of trees says of a task: as its episode was opened, in whichever process that was."""
    return {"question": tree.root.observation, "answers": list(tree.info.get("answers", ()))}


def eval_task_ids(env_id: str, env_kwargs: dict[str, Any], per_hop: int) -> list[str]:
    """Returns the first `per_hop` tasks of each number of hops (all tasks if it is 0), in the data set's order."""
    with contextlib.closing(make_env(env_id, env_kwargs)) as made:
        env: Any = made.unwrapped
        ids = list(env.task_ids())
        if not per_hop:
            return ids
        taken: dict[int, int] = {}
        chosen = []
        for task_id in ids:
            hops = int(getattr(env.pick_task(np.random.default_rng(0), task_id), "hops", 0))
            if taken.get(hops, 0) < per_hop:
                taken[hops] = taken.get(hops, 0) + 1
                chosen.append(task_id)
        return chosen


def batch_figures(forest: Forest) -> dict[str, Any]:
    """Returns what the log says of a batch: success, effective ratios, the ledger, and where the budget went."""
    leaves = [leaf for tree in forest for leaf in tree.leaves("root")]
    rewards = [tree.returns()[[leaf.id for leaf in tree.leaves("root")]] for tree in forest]
    figures: dict[str, Any] = {
        "train/success": float(np.mean([bool(leaf.is_correct) for leaf in leaves])),
        "train/reward": float(np.concatenate(rewards).mean()),
        "train/turns": float(np.mean([leaf.depth for leaf in leaves])),
        "train/prompts": len(forest),
        "effective_ratio/roots": forest.effective_ratio("root"),
        "effective_ratio/tree": forest.effective_ratio(),
    }
    figures |= {f"ledger/{name}": count for name, count in forest.ledger.counts().items()}
    for tree in forest:
        name = f"budget/by_hops/{tree.info.get('hops', 0)}"
        figures[name] = figures.get(name, 0) + len(tree.leaves())
        for leaf in tree.leaves():
            name = f"budget/by_depth/{_branch_depth(tree, leaf)}"
            figures[name] = figures.get(name, 0) + 1
    return figures


def _branch_depth(tree: Any, leaf: Any) -> int:
    """Returns the depth of the anchor that a rollout started from."""
    if leaf.origin == "root":
        return 0
    return min(n.depth for n in tree.path(leaf) if n.rollout == leaf.rollout) - 1
