"""`twinpool demo`: serves the built-in model, asks it things with known answers, and checks.

Owns the story that is shown and what counts as wrong. The processes are `launch.cluster`'s, the
tasks `launch.builtin.task`'s.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table
from twinpool import (
    AsyncClient,
    GenerateOptions,
    Message,
    RequestStats,
    Status,
    TwinpoolError,
    Usage,
)

from launch import builtin
from launch.builtin import task
from launch.builtin.task import Example
from launch.cluster import SECURITY_FIELDS, Cluster, ClusterConfig, check_security
from launch.connection import client_tls
from launch.console import table_console
from launch.reference import reference_answers
from service.config import launcher
from service.errors import StartError
from service.lifecycle import run
from service.logs import configure_logging
from service.security.settings import (
    TlsCa,
    TlsCert,
    TlsKey,
    TlsRequireClientCert,
    TlsServerName,
    TokensFile,
    WorkerTokenFile,
)
from service.threads import default_threads

MAX_NEW_TOKENS = 32
_REQUEST_TIMEOUT_S = 120.0
_SETTLE_TIMEOUT_S = 10.0
_CONCURRENT = 4
_PAIRS = (8, 32, 128)


class DemoConfig(BaseModel):
    """What `twinpool demo` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int = Field(default=20, ge=1, description="Recall prompts to measure accuracy on.")
    long_tokens: int = Field(
        default=4000, ge=64, le=6000, description="Length of the longest prompt, in tokens."
    )
    seed: int = Field(default=1, description="Draws the prompts.")
    threads: int = Field(
        default_factory=default_threads,
        ge=1,
        description="Threads that compute in each of prefill and decode.",
    )
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_ca: TlsCa = None
    tls_require_client_cert: TlsRequireClientCert = False
    tls_server_name: TlsServerName = ""
    tokens_file: TokensFile = None
    worker_token_file: WorkerTokenFile = None
    token_file: Path | None = Field(
        default=None, description="File of a token with the right 'admin', to ask the router with."
    )

    @model_validator(mode="after")
    def _has_whole_security(self) -> Self:
        check_security(self)
        return self


class DemoFailed(StartError):
    """Something was wrong; the message lists what."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one example, and when."""

    title: str
    example: Example
    text: str
    token_ids: tuple[int, ...]
    ttft_s: float
    e2el_s: float
    usage: Usage
    stats: RequestStats

    @property
    def is_right(self) -> bool:
        return self.example.is_right(self.text)

    @property
    def tpot_s(self) -> float:
        return (self.e2el_s - self.ttft_s) / max(1, self.usage.completion_tokens - 1)


def showcase(rng: Random, long_tokens: int) -> list[tuple[str, Example]]:
    """Returns one example of each kind of task, with a title."""
    return [
        ("long recall", task.recall(rng, task.pairs_for_tokens(long_tokens))),
        ("short recall", task.recall(rng, 8)),
        ("copy", task.copy(rng, 8)),
        ("sum", task.addition(17, 25)),
        ("hello", Example(task="talk", prompt="who are you?", answer="i am a small test model.")),
        ("unicode", Example(task="talk", prompt="čau 😀 ñandú", answer=task.UNKNOWN_ANSWER)),
    ]


def recall_examples(rng: Random, count: int) -> list[Example]:
    """Returns recall prompts of several lengths to measure accuracy on."""
    return [task.recall(rng, rng.choice(_PAIRS)) for _ in range(count)]


class Demo:
    """The run of one demonstration against a cluster that is up."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self._config = config
        self._console = console

    async def run(self, cluster: Cluster) -> None:
        """Shows everything; raises `DemoFailed` with what was wrong."""
        rng = Random(self._config.seed)
        async with AsyncClient(
            cluster.address, tls=client_tls(self._config), token_file=self._config.token_file
        ) as client:
            before = await client.status()
            shown = [
                await self._ask_aloud(client, title, example)
                for title, example in showcase(rng, self._config.long_tokens)
            ]
            self._console.print(requests_table(shown))
            examples = recall_examples(rng, self._config.prompts)
            self._console.print(f"\nrecall, {len(examples)} prompts, {_CONCURRENT} at a time ...")
            measured = await _ask_all(client, examples)
            after = await _settled(client, before)
        self._console.print("the same prompts with the engine alone in one process ...")
        alone = await reference_answers(
            builtin.MODEL_DIR,
            [example.prompt for example in examples],
            max_new_tokens=MAX_NEW_TOKENS,
            threads=self._config.threads,
        )
        problems = [
            *_wrong_answers(shown),
            *self._compare(measured, alone),
            *self._blocks(before, after),
        ]
        if problems:
            raise DemoFailed("\n  ".join(["something is wrong", *problems]))
        self._console.print("\nall right")

    async def _ask_aloud(self, client: AsyncClient, title: str, example: Example) -> Answer:
        self._console.print(f"\n[bold]{title}[/]  {_clip(example.prompt)}", highlight=False)
        answer = await ask(client, title, example, aloud=True)
        print(flush=True)
        return answer

    def _compare(self, measured: Sequence[Answer], alone: list[dict[str, Any]]) -> list[str]:
        ours = sum(answer.is_right for answer in measured)
        theirs = sum(
            answer.example.is_right(single["text"])
            for answer, single in zip(measured, alone, strict=True)
        )
        same = sum(
            list(answer.token_ids) == single["token_ids"]
            for answer, single in zip(measured, alone, strict=True)
        )
        total = len(measured)
        table = Table(title="recall accuracy, greedy", title_justify="left")
        for column in ("prompts", "prefill + decode", "one process", "same tokens"):
            table.add_column(column, justify="right")
        table.add_row(str(total), f"{ours / total:.1%}", f"{theirs / total:.1%}", f"{same}/{total}")
        self._console.print(table)
        if ours < theirs:
            return [f"recall is {ours}/{total} where one process has {theirs}/{total}"]
        return []

    def _blocks(self, before: Status, after: Status) -> list[str]:
        table = Table(title="KV blocks in use", title_justify="left")
        for column in ("instance", "before", "after"):
            table.add_column(column, justify="left" if column == "instance" else "right")
        problems = []
        used_before, used_after = blocks_in_use(before), blocks_in_use(after)
        for name in sorted(used_before | used_after):
            counts = used_before.get(name, 0), used_after.get(name, 0)
            table.add_row(name, *map(str, counts))
            if counts[0] != counts[1]:
                problems.append(f"{name} has {counts[1]} blocks in use, {counts[0]} before")
        self._console.print(table)
        return problems


async def ask(client: AsyncClient, title: str, example: Example, *, aloud: bool = False) -> Answer:
    """Sends an example as a chat and returns the answer; `aloud` prints it as it comes."""
    began = time.perf_counter()
    first_s = None
    chunks = []
    prompt = [Message(role="user", content=example.prompt)]
    options = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, timeout_s=_REQUEST_TIMEOUT_S)
    async with client.generate(prompt, **options) as stream:
        async for chunk in stream:
            if first_s is None and chunk.token_ids:
                first_s = time.perf_counter() - began
            if aloud:
                print(chunk.text, end="", flush=True)
            chunks.append(chunk)
    took_s = time.perf_counter() - began
    last = chunks[-1]
    assert last.usage is not None
    assert last.stats is not None
    return Answer(
        title=title,
        example=example,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        ttft_s=took_s if first_s is None else first_s,
        e2el_s=took_s,
        usage=last.usage,
        stats=last.stats,
    )


def requests_table(answers: Sequence[Answer]) -> Table:
    """Returns the table of the requests that were shown, one row each."""
    table = Table(title="requests", title_justify="left")
    table.add_column("request")
    for column in ("prompt tokens", "TTFT", "TPOT", "KV moved", "hand-off"):
        table.add_column(column, justify="right")
    table.add_column("over")
    table.add_column("answer")
    for answer in answers:
        table.add_row(
            answer.title,
            str(answer.usage.prompt_tokens),
            f"{1000 * answer.ttft_s:.0f} ms",
            f"{1000 * answer.tpot_s:.1f} ms",
            f"{answer.stats.kv_bytes / 2**20:.2f} MiB",
            f"{1000 * answer.stats.handoff_s:.1f} ms",
            answer.stats.kv_transport,
            "right" if answer.is_right else f"wrong, not {answer.example.answer!r}",
        )
    return table


def blocks_in_use(status: Status) -> dict[str, int]:
    """Returns by instance how many KV blocks are not free, here or in the router's ledger."""
    return {
        one.name: max(one.blocks.total - one.blocks.free - one.blocks.cached, one.ledger_reserved)
        for one in status.instances
    }


async def _ask_all(client: AsyncClient, examples: Sequence[Example]) -> list[Answer]:
    slots = asyncio.Semaphore(_CONCURRENT)

    async def one(example: Example) -> Answer:
        async with slots:
            return await ask(client, "recall", example)

    return list(await asyncio.gather(*map(one, examples)))


async def _settled(client: AsyncClient, before: Status) -> Status:
    """Returns the status once blocks are as before; heartbeats tell of them with a delay."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        status = await client.status()
        if blocks_in_use(status) == blocks_in_use(before) or time.monotonic() > deadline:
            return status
        await asyncio.sleep(0.2)


def _wrong_answers(answers: Sequence[Answer]) -> list[str]:
    return [
        f"{answer.title}: answered {answer.text!r}, not {answer.example.answer!r}"
        for answer in answers
        if not answer.is_right
    ]


def _clip(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:48]} ... {text[-48:]}"


def start(config: DemoConfig) -> None:
    """Runs the demonstration; exits with 0 only when all was right."""
    configure_logging(role="demo", level="warning")
    if not Path(builtin.MODEL_DIR, "config.json").exists():
        raise StartError(f"the built-in model is not at {builtin.MODEL_DIR}")
    cluster = ClusterConfig(
        port=0,
        restart=False,
        drain_timeout_s=2.0,
        log_level="error",
        **config.model_dump(include={"threads", *SECURITY_FIELDS}),
    )

    async def main() -> None:
        demo = Demo(config, table_console())
        if not await Cluster(cluster, lambda line: print(line, flush=True)).run(demo.run):
            raise DemoFailed("stopped before its end")

    run(main, role="demo", expected=(TwinpoolError,))


app = launcher(
    "demo",
    DemoConfig,
    start,
    help="Serve the built-in model on free ports, send it prompts with known answers, and check"
    " answers, KV blocks and accuracy against the engine alone.",
)
