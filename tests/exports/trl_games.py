"""A game with one tool, and a tiny Qwen3 that was taught to play it: it looks up a place, and half of its answers are wrong."""

from dataclasses import dataclass, replace

import gymnasium as gym
import torch
from qwen_family import public_template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import get_json_schema

from agents.trl import environment_factory, trl_dataset
from trace_envs.env import ToolEnv
from trace_envs.state import Outcome, Task

PLACES = {"Ada": "Rome", "Bob": "Oslo", "Cem": "Lima", "Dag": "Bonn"}
END = "<|im_end|>"


def tool(name, description="", required=(), /, **properties):
    """A schema as environments write them."""
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


LOOKUP = tool("lookup", "Says where someone is.", ["name"], name={"type": "string", "description": "Who."})
# Said or not, there are no other arguments; unsaid, the schema is to the letter what TRL shows a model.
del LOOKUP["function"]["parameters"]["additionalProperties"]


@dataclass(frozen=True, slots=True)
class PlaceTask(Task):
    place: str = ""


class PlaceEnv(ToolEnv):
    """Where is somebody? A look-up that knows nobody is refused."""

    def __init__(self, **kwargs):
        super().__init__(**({"max_turns": 3, "system_prompt": ""} | kwargs))

    def tool_schemas(self):
        return [LOOKUP]

    def task_ids(self):
        return list(PLACES)

    def pick_task(self, rng, task_id):
        name = task_id or list(PLACES)[int(rng.integers(len(PLACES)))]
        return PlaceTask(name, f"Where is {name}?", PLACES[name])

    def call_tool(self, state, call):
        name = call.arguments["name"]
        if name not in PLACES:
            return state, f"Error: there is no {name}.", True
        return replace(state, world=name), f"{name} is in {PLACES[name]}.", False

    def judge(self, state, answer):
        right = answer == state.task.place
        return Outcome(right, 1.0 if right else 0.25 * (answer is not None), {"em": float(right)})


CITY = {"type": "object", "properties": {"name": {"type": "string"}, "zip": {"type": "integer"}}, "required": ["name"]}
TOOLS = [
    tool(
        "book",
        "Books a trip.\nReturns: a number.",
        ["days", "city"],
        note={"type": "string"},
        days={"type": "integer", "description": "How\nlong: in days (choices: [1])"},
        city=CITY,
        by={"enum": ["train", "ship"], "description": "Means."},
        price={"type": ["number", "null"], "description": "Most.", "minimum": 0},
    ),
    tool(
        "pack-bag",
        "",
        ["things"],
        things={"type": "array", "items": {"type": "string", "enum": ["hat", "pen"]}, "description": "What."},
        weights={"type": "object", "additionalProperties": {"type": "number"}, "description": "Kilograms by thing."},
        fast={"type": "boolean", "description": "In a hurry?"},
    ),
    tool("wait", "Does nothing."),
]


class TripEnv(PlaceEnv):
    """Tools with arguments of every kind, which all say what they were given."""

    def tool_schemas(self):
        return TOOLS

    def call_tool(self, state, call):
        return state, f"{call.name} {dict(call.arguments)}", False


class OneToolEnv(TripEnv):
    """A tool that the test names, or none."""

    def __init__(self, schemas=(), **kwargs):
        self.schemas = list(schemas)
        super().__init__(**kwargs)

    def tool_schemas(self):
        return self.schemas


class TwinEnv(PlaceEnv):
    """Two tasks in the same words."""

    def task_ids(self):
        return ["Ada", "Bob"]

    def pick_task(self, rng, task_id):
        return replace(super().pick_task(rng, task_id or "Ada"), prompt="Where?")


def register():
    for name in ("Place", "Trip", "OneTool", "Twin"):
        if f"{name}-v0" not in gym.registry:
            gym.register(id=f"{name}-v0", entry_point=f"trl_games:{name}Env")


def play(name, place):
    """What an assistant writes in its two turns."""
    return (
        f'<tool_call>\n{{"name": "lookup", "arguments": {{"name": "{name}"}}}}\n</tool_call>',
        f"<answer>{place}</answer>",
    )


def conversations(tokenizer):
    """Rendered games as a trainer renders them: for each task one with the right answer, one with a wrong one."""
    schema = get_json_schema(environment_factory("Place-v0")().lookup)
    games = []
    for row in trl_dataset("Place-v0"):
        name, places = row["task_id"], list(PLACES.values())
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tools=[schema], add_generation_prompt=True, tokenize=False
        )
        for place in (PLACES[name], places[(places.index(PLACES[name]) + 1) % len(places)]):
            call, answer = play(name, place)
            seen = f"\n<|im_start|>user\n<tool_response>\n{name} is in {PLACES[name]}.\n</tool_response>{END}\n"
            games.append((prompt, f"{call}{END}{seen}<|im_start|>assistant\n{answer}{END}"))
    return games


def small_tokenizer():
    """A small byte-level BPE with Qwen3's template and the tokens that the template needs."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
    wrapped.chat_template = public_template("qwen3")
    texts = [prompt + rest for prompt, rest in conversations(wrapped)]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=640,
            special_tokens=["<|endoftext|>", "<|im_start|>", END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    words = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    backend.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = public_template("qwen3")
    return tokenizer


def player(tokenizer, steps=80):
    """A tiny Qwen3 that plays the game."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=512,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        games = conversations(tokenizer)
        batch = tokenizer([prompt + rest for prompt, rest in games], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, (prompt, _) in zip(labels, games, strict=True):
            row[: len(tokenizer(prompt)["input_ids"])] = -100
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            loss = model(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
