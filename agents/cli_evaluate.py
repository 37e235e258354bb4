"""`trace-envs evaluate`: one rollout a question, by a script, a model, or whatever a server answers.

Invariant: an engine or client that is not used is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agents.evaluate import evaluate, make_env
from agents.models import TINY, env_settings, load_model, load_tokenizer, model_source, shipped_for
from agents.policies import SCRIPTS, Policy, ScriptedPolicy, TransformersPolicy
from agents.policies.engine_config import EngineConfig
from agents.policies.make import say_template
from agents.policies.sampling import Sampling
from agents.policies.scripted import oracle_of
from agents.tasks import level_name, task_ids, with_split
from allocation import Forest
from allocation.asking import AsyncPolicy
from allocation.export.chat import append_chat
from trace_envs.env import ToolEnv

ENGINES = ("transformers", "vllm", "openai")
MODEL = "model"


@dataclass(frozen=True)
class ServerConfig:
    """Where `--policy openai` asks.

    Attributes:
        base_url: Address of the server, such as http://localhost:8000/v1; OpenAI's own if it is left out.
        api_key_env: Environment variable with the key.
        native_tools: Send the tools' schemas and read the server's tool calls; otherwise the system prompt explains the format
            and calls are read from the text.
        tool_role: Without native tools, the role of a tool's result: `user` (marked as a result; every server takes it) or
            `tool` (for local servers whose template knows the role; `tiny` was trained on it).
        max_concurrency: Most requests under way at once.
        requests_per_minute: Most requests a minute; no limit if it is left out.
        timeout: Seconds that one request may take.
        max_retries: Times that a request is repeated, with growing pauses, when the server fails or refuses for now.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    native_tools: bool = False
    tool_role: Literal["user", "tool"] = "user"
    max_concurrency: int = 16
    requests_per_minute: float | None = None
    timeout: float = 60.0
    max_retries: int = 5


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluates a scripted agent or a model on an environment.

    Attributes:
        env_id: Gymnasium environment.
        dataset: Data set: synthetic (if it is left out), hotpotqa, 2wikimultihopqa, musique or bamboogle.
        data_path: File with the questions of a real data set.
        corpus_path: File with the passages to search; the questions' own contexts if it is left out.
        split: Split of the data set or suite.
        suite: Of TraceToolUse-v0: `embedded` (if it is left out) or `bfcl-v4`.
        category: Of TraceToolUse-v0 and TraceMath-v0: kind of tasks, such as `shop`, `multi_turn_base` or `word`.
        levels: Of TraceMath-v0: levels of the problems; all if it is left out.
        calls_per_turn: Of TraceToolUse-v0: most calls of one turn.
        agent: A scripted agent, `oracle` or `bm25`, or `model`. If it is left out, `model` where a policy or model is named,
            else `oracle`.
        policy: What runs the model: `transformers`, `vllm`, or `openai` for any server with OpenAI's interface.
        model: `tiny`, a local folder, or a hub id; with `--policy openai`, what the server calls it (its only one if it is left
            out).
        server: With `--policy openai`: the server.
        engine: With `--policy vllm`: settings of the engine.
        device: With `--policy transformers`: where the model runs.
        dtype: With `--policy transformers`: precision of the weights; `auto` as they were saved.
        top_k: Passages that a search returns; if it is left out, what `tiny` was trained on, else the environment's
            default.
        max_turns: Turns after which an episode is truncated; the environment's default if it is left out.
        action_format: `hermes`, `react` or `tags`.
        system_prompt: First message; if it is left out, none for `tiny`, else the format's instructions.
        limit: Evaluate the first so many questions; 0 for all.
        temperature: Sampling temperature of a model; 0 is greedy.
        sampling_top_p: Share of the probability that a model samples from, the likeliest tokens first.
        sampling_top_k: Number of tokens that a model samples from, the likeliest first; 0 for all.
        stop: Strings that end a turn.
        max_new_tokens: Token limit of one turn of a model.
        max_context: Token limit of an episode; if it is left out, what the model can take.
        thinking: Passed to the chat template as `enable_thinking`, for models that have such a switch.
        num_envs: Episodes that run side by side.
        seed: Seeds everything random.
        output: Also write the figures to this file, as JSON.
        save_rollouts: Also append every episode to this file as it ends, as a line of JSON with its chat messages.
    """

    env_id: str = "TraceMultiHopQA-v0"
    dataset: str | None = None
    data_path: str | None = None
    corpus_path: str | None = None
    split: str = "test"
    suite: str | None = None
    category: str | None = None
    levels: tuple[int, ...] | None = None
    calls_per_turn: int | None = None
    agent: str | None = None
    policy: str | None = None
    model: str | None = None
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: str = "cpu"
    dtype: str = "auto"
    top_k: int | None = None
    max_turns: int | None = None
    action_format: str | None = None
    system_prompt: str | None = None
    limit: int = 0
    temperature: float = 1.0
    sampling_top_p: float = 1.0
    sampling_top_k: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64
    max_context: int | None = None
    thinking: bool | None = None
    num_envs: int = 64
    seed: int = 0
    output: Path | None = None
    save_rollouts: Path | None = None

    def check(self) -> None:
        """Refuses settings that are out of range or do not go together.

        Raises:
            ValueError: The message says which.
        """
        for name, least in (("limit", 0), ("num_envs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        known: dict[str, Sequence[str | None]] = {"agent": (*SCRIPTS, MODEL, None), "policy": (*ENGINES, None)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                names = ", ".join(v for v in values if v is not None)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {names}")
        if self.agent in SCRIPTS and self.policy is not None:
            raise ValueError(
                f"--agent {self.agent} is scripted and --policy {self.policy} runs a model; give one of them"
            )
        if self.server != ServerConfig() and self.policy != "openai":
            raise ValueError("--base-url and the other settings of a server go with --policy openai")
        _ = self.sampling  # says what is out of range

    @property
    def script(self) -> str | None:
        """The scripted agent; `None` for a model."""
        if self.agent is None:
            return "oracle" if self.policy is None and self.model is None else None
        return None if self.agent == MODEL else self.agent

    @property
    def sampling(self) -> Sampling:
        """How a model's actions are sampled."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.sampling_top_p,
            top_k=self.sampling_top_k,
            stop=self.stop,
            max_context=self.max_context,
            seed=self.seed,
        )

    def env_kwargs(self) -> dict[str, Any]:
        """Returns the arguments of the environment: those given, and what a shipped model brings."""
        given = {
            "dataset": self.dataset,
            "data_path": self.data_path,
            "corpus_path": self.corpus_path,
            "suite": self.suite,
            "category": self.category,
            "levels": self.levels,
            "calls_per_turn": self.calls_per_turn,
            "top_k": self.top_k,
            "max_turns": self.max_turns,
            "action_format": self.action_format,
            "system_prompt": self.system_prompt,
        }
        given = with_split(self.env_id, {name: value for name, value in given.items() if value is not None}, self.split)
        if self.script is not None or self.policy == "openai":
            return given
        return env_settings(self.model or TINY, self.env_id) | given


def parse(cls: type, argv: Sequence[str], command: str, **kwargs: Any) -> Any:
    """Reads the arguments of a command."""
    return tyro.cli(cls, args=list(argv), prog=f"trace-envs {command}", **kwargs)


def evaluate_command(argv: Sequence[str]) -> int:
    """Runs `trace-envs evaluate`."""
    args = parse(EvaluateArgs, argv, "evaluate")
    args.check()
    known = args.env_kwargs()
    with closing(make_env(args.env_id, known)) as env:
        ids = task_ids(args.env_id, env)
    ids = ids[: args.limit] if args.limit else ids
    console = Console()
    with ExitStack() as opened:
        policy, name = _policy(args, known, opened)
        bar = Progress(
            TextColumn(f"evaluating {name}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        task = bar.add_task("", total=len(ids))
        if console.is_terminal:
            opened.enter_context(bar)

        def done(forest: Forest) -> None:
            bar.advance(task, len(forest))
            if args.save_rollouts is not None:
                append_chat(forest, args.save_rollouts)

        record = evaluate(policy, args.env_id, known, ids, num_envs=args.num_envs, seed=args.seed, done=done)
    console.print(_evaluation_table(args, name, record))
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _policy(args: EvaluateArgs, known: dict[str, Any], opened: ExitStack) -> tuple[Policy | AsyncPolicy, str]:
    """Returns the policy and what to call it; what has to be closed goes on the stack."""
    if args.script is not None:
        script: Any = args.script
        if script == "oracle":
            knowing = opened.enter_context(closing(make_env(args.env_id, known))).unwrapped
            if not isinstance(knowing, ToolEnv):
                raise ValueError(f"--agent oracle: {args.env_id} has no oracle; name a --model or a --policy")
            script = oracle_of(knowing)
        return ScriptedPolicy(script, action_format=args.action_format or "hermes", seed=args.seed), args.script
    keywords: dict[str, Any] = {n: getattr(args.sampling, n) for n in args.sampling.__dataclass_fields__}
    if args.policy == "openai":
        return _server_policy(args, keywords, opened)
    name = shipped_for(args.model or TINY, args.env_id)
    keywords["template_kwargs"] = {} if args.thinking is None else {"enable_thinking": args.thinking}
    policy: Any
    if args.policy == "vllm":
        from agents.policies.vllm_policy import VLLMPolicy

        policy = VLLMPolicy(model_source(name), load_tokenizer(name), engine=args.engine, **keywords)
    else:
        model, tokenizer = load_model(name, device=args.device, dtype=args.dtype)
        policy = TransformersPolicy(model, tokenizer, **keywords)
    opened.enter_context(closing(policy))
    say_template(policy)
    return policy, name


def _server_policy(args: EvaluateArgs, keywords: dict[str, Any], opened: ExitStack) -> tuple[AsyncPolicy, str]:
    from agents.policies.openai_policy import OpenAIPolicy

    refused = [n for n in ("top_k", "max_context") if keywords.pop(n) not in (0, None)]
    if refused:
        raise ValueError(f"--policy openai has no {refused[0]}: the server's interface does not know it")
    if args.thinking is not None:
        keywords["extra_body"] = {"chat_template_kwargs": {"enable_thinking": args.thinking}}
    server = {name: getattr(args.server, name) for name in args.server.__dataclass_fields__}
    policy = OpenAIPolicy(args.model, action_format=args.action_format or "hermes", **server, **keywords)
    opened.enter_context(closing(policy))
    return policy.asynchronous(), policy.model


def _evaluation_table(args: EvaluateArgs, name: str, record: dict[str, Any]) -> Table:
    table = Table(title=f"{name} on {args.dataset or args.env_id}, {record['eval/questions']} questions")
    table.add_column("measure")
    table.add_column("value", justify="right")
    levels = level_name(args.env_id)
    labels = {
        "eval/em": "exact match",
        "eval/f1": "F1",
        "eval/supporting_recall": "recall of supporting passages",
        "eval/turns_passed": "user turns done right",
        "eval/state_match": "  of these checks: the world is right",
        "eval/response_match": "  of these checks: the answer is right",
    }
    for key, label in labels.items():
        if key in record:
            table.add_row(label, f"{100 * record[key]:.1f} %")
    table.add_row("turns", f"{record['eval/turns']:.2f}")
    table.add_row("tool errors", f"{record['eval/tool_errors']:.2f}")
    table.add_row("cut short (turns, context, no answer)", f"{100 * record['eval/truncated']:.1f} %")
    for key, label in {"eval/out_of_context": "no room in the context", "eval/policy_error": "no answer came"}.items():
        if record.get(key):
            table.add_row(f"  of these: {label}", f"{100 * record[key]:.1f} %")
    for key, value in record.items():
        if key.startswith("eval/accuracy_by_level/"):
            level = key.rsplit("/", 1)[1]
            count = record[f"eval/questions_by_level/{level}"]
            table.add_row(
                f"accuracy, {levels} {level} ({count})" if level != "0" else f"accuracy ({count})",
                f"{100 * value:.1f} %",
            )
    return table
