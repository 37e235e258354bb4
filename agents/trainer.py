"""The training loop: collect a forest, learn from it, let the allocator learn, repeat.

Invariant: everything that influences the next update is in `Trainer.state_dict`; wall-clock influences nothing.

GRPO and PPO are one loop with two sources of advantages: the forest alone, or the forest and a critic (`--estimator gae`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import numpy as np
import torch

from agents.checkpoint import CheckpointError, Loaded, list_checkpoints, load_latest, save_checkpoint
from agents.config import TrainConfig, check_resumable, fingerprint, load_config, resolve, to_dict
from agents.critic_predictor import CriticPredictor
from agents.display import TrainingDisplay
from agents.evaluate import evaluate, make_vector
from agents.figures import batch_figures
from agents.interrupt import Interrupt
from agents.learner import Learner
from agents.lora import add_adapters, saved_part
from agents.models import load_model
from agents.policies import collect
from agents.policies.make import make_trainable
from agents.reference import make_reference
from agents.runlog import CONFIG, METRICS, RunLog, read_jsonl
from agents.tasks import TaskDeck, eval_task_ids, pool_of_levels, with_split
from agents.tokenizer_checks import check_vocabulary
from allocation import Ledger, Tree, TreeAllocationWrapper, make_allocator, make_predictor
from allocation.methods.predicted import PredictedAllocator
from allocation.tree_record import tree_record

logger = logging.getLogger(__name__)


class Trainer:
    """One run.

    Args:
        config: Its settings.
        resume: Go on from the latest checkpoint of the run's directory.

    Attributes:
        config: The settings, resolved.
        model: The policy's model, in evaluation mode (with adapters in it, if it has any).
        learner: What updates it.
        update: Updates done.
        total: What the run has cost so far.

    Raises:
        ValueError: Settings are unknown or do not go together, or differ from those of the run to go on with.
        FileExistsError: There is a run of that name, and it is not to be resumed.
        FileNotFoundError: There is no run to go on with, or no such model.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False):
        self.config = config = resolve(config, resume=resume)
        for reason in config.ignored:
            logger.warning("%s", reason)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.update = 0
        self.total = Ledger()
        # Whether the weights may already be those of the update in progress.
        self._learning = False
        checkpoint = self._checkpoint() if resume else None
        self._resumed = checkpoint is not None
        source = config.model if checkpoint is None else str(checkpoint.path)
        self.model, self.tokenizer = load_model(source, device=config.device, dtype="float32")
        check_vocabulary(self.model, self.tokenizer)
        if config.lora.rank and checkpoint is None:
            add_adapters(self.model, config.lora, config.seed)
        reference = None
        if config.kl_coef:
            reference = make_reference(
                config.model, self.model, self.tokenizer, temperature=config.temperature, precision=config.precision
            )
        self.learner = Learner(
            self.model,
            config,
            updates=config.updates,
            temperature=config.temperature,
            seed=config.seed,
            reference=reference,
            directory=config.directory / "skipped",
        )
        self.env_kwargs = with_split(config.env_id, config.env.kwargs(), config.train_split)
        self.allocator = make_allocator(
            config.allocator,
            predictor=self._predictor(),
            group_size=config.group_size,
            config=config.trace_plus if config.allocator == "trace_plus" else config.trace,
        )
        self.rng = np.random.default_rng([config.seed, 0x7AC3])
        with contextlib.ExitStack() as opened:
            self.policy = opened.enter_context(
                contextlib.closing(
                    make_trainable(config, self.model, self.tokenizer, entropy=self.allocator.uses_entropy)
                )
            )
            predicted = isinstance(self.allocator, PredictedAllocator)
            envs = opened.enter_context(
                contextlib.closing(make_vector(config.env_id, config.num_envs, self.env_kwargs))
            )
            self.deck = TaskDeck(pool_of_levels(config.env_id, envs.envs[0], config.train_levels))
            self.envs = TreeAllocationWrapper(
                envs,
                allocator=self.allocator,
                budget=config.budget,
                roots=self.deck,
                encode=self.policy.encode if self.policy.gives_features and predicted else None,
            )
            self.log = opened.enter_context(RunLog(config.directory, resume=resume, trackers=config.trackers))
            if checkpoint is not None:
                self._load(checkpoint)
                self.policy.sync(self.model, self.update)
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
        self._learning = True
        learned = self.learner.update(forest)
        updated = time.perf_counter()
        synced = self.policy.sync(self.model, self.update + 1)
        allocated = time.perf_counter()
        allocation = self.allocator.update(forest)
        self.update += 1
        self.total.add(forest.ledger)
        end = time.perf_counter()
        record = {
            "update": self.update,
            **batch_figures(forest, self.update - 1),
            **learned.figures,
            **synced,
            **allocation,
        }
        record |= {f"time/{k}": v for k, v in forest.ledger.seconds.items()}
        record |= {"time/rollout": rolled - start, "time/update": updated - rolled, "time/predictor": end - allocated}
        record |= {"time/sync": allocated - updated} if synced else {}
        advantages = learned.table.per_tree(learned.credit.advantage)
        for tree, advantage in list(zip(forest, advantages, strict=True))[: self.config.log_trees]:
            self.log.log_tree({"update": self.update, **_task_record(tree), **tree_record(tree, advantage)})
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
        with TrainingDisplay(self.config.updates, history=history) as display, Interrupt(display) as interrupt:
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

    def _evaluate(self) -> dict[str, Any]:
        start = time.perf_counter()
        # A policy of its own: evaluation must not move the generator that training samples from.
        policy = self.policy.sibling(seed=self.config.seed + 1)
        kwargs = with_split(self.config.env_id, self.env_kwargs, self.config.eval_split)
        record = evaluate(
            policy, self.config.env_id, kwargs, eval_task_ids(self.config.env_id, kwargs, self.config.eval_per_level)
        )
        record = {"update": self.update, **record, "time/evaluation": time.perf_counter() - start}
        self.log.log(record)
        return record

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next update depends on, the model's weights apart."""
        return {
            "learner": self.learner.state_dict(),
            "allocator": self.allocator.state_dict(),
            "ledger": self.total.counts(),
            **self._streams(),
        }

    def _streams(self) -> dict[str, Any]:
        """Returns what collecting a forest moves on: generators and the deck."""
        return {
            "deck": self.deck.state_dict(),
            "rng": self.rng.bit_generator.state,
            "sampling": self.policy.state_dict(),
        }

    def _set_streams(self, state: dict[str, Any]) -> None:
        self.deck.load_state_dict(state["deck"])
        self.rng.bit_generator.state = state["rng"]
        self.policy.load_state_dict(state["sampling"])

    def save(self) -> None:
        """Writes a checkpoint."""
        # What the log holds must not be behind the checkpoint, whatever happens next.
        self.log.sync()
        save_checkpoint(
            self.config.directory / "checkpoints",
            self.update,
            saved_part(self.model),
            self.tokenizer,
            self.state_dict(),
            keep=self.config.keep_checkpoints,
            fingerprint=fingerprint(self.config),
        )

    def _checkpoint(self) -> Loaded | None:
        """Returns the checkpoint to go on from, once it is clear that these settings can; `None` if nothing was done yet."""
        config = self.config
        metrics = config.directory / METRICS
        begun = list_checkpoints(config.directory / "checkpoints") or (metrics.exists() and metrics.stat().st_size)
        if not begun and (config.directory / CONFIG).exists():
            return None
        if (config.directory / CONFIG).exists():
            check_resumable(config, load_config(config.directory / CONFIG))
        checkpoint = load_latest(config.directory / "checkpoints", fingerprint(config))
        if config.updates < checkpoint.update:
            raise ValueError(
                f"--resume: {checkpoint.update} updates of {config.directory} are done; --updates {config.updates} is fewer"
            )
        return checkpoint

    def _load(self, checkpoint: Loaded) -> None:
        state = checkpoint.state
        try:
            self.learner.load_state_dict(state["learner"])
            self.allocator.load_state_dict(state["allocator"])
            self._set_streams(state)
            self.total = Ledger(**state["ledger"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {checkpoint.path} does not fit the settings of the run or this release "
                f"({type(error).__name__}: {error}); resume with the settings in {self.config.directory / CONFIG}"
            ) from error
        self.update = checkpoint.update
        self.log.truncate_after(self.update)

    def _predictor(self) -> Any:
        """Returns what predicts success: the critic itself, or a model of its own."""
        assert self.config.predictor is not None, "the settings were resolved"
        if self.config.predictor == "critic":
            assert self.learner.critic is not None, "the settings were checked"
            return CriticPredictor(self.learner.critic)
        return make_predictor(
            self.config.predictor, feature_dim=int(self.model.config.hidden_size), seed=self.config.seed
        )


def _task_record(tree: Tree) -> dict[str, Any]:
    """Returns what the log of trees says of a task: as its episode was opened, in whichever process that was."""
    return {"question": tree.root.observation, "answers": list(tree.info.get("answers", ()))}
