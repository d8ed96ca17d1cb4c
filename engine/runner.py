"""Runs a model on chunks of sequences. Owns the weights and the cache of one rank.

Does not decide what to run, does not own block ids, and does not sample. Not thread-safe:
one thread, the step loop's, calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import Batch, Chunk, PrefillSpan, make_batch, no_batch
from engine.config import ModelConfig
from engine.deterministic import check_deterministic, in_order
from engine.dispatch import AUTO as AUTO_DISPATCH
from engine.dispatch import ExpertMap, dispatch_for
from engine.errors import BatchError, UnsupportedError
from engine.kernels import attention_kernel, has_forms, prompt_kernel
from engine.kernels.latent_prompts import LatentWeights, split
from engine.kvcache import Allocate, KVCache
from engine.layers.attention import Attend, Pass
from engine.layers.layer import Placement
from engine.layers.rotary import Angles
from engine.models import load_model
from engine.parallel import Alone, Collectives, ExpertGroup, Layout
from engine.pipeline import Apart, Logits, OneStage, Pipeline, Stages
from engine.ring.calibrate import Trial
from engine.ring.choose import Variant
from engine.ring.comm import Wire
from engine.ring.cyclic import Dealing, dealing_of
from engine.ring.passes import AUTO, Ring
from engine.sampling import warm_up_sampling
from engine.split_experts import SplitExperts, check_redundant
from engine.step_graphs import Capture, StepGraphs
from engine.step_graphs import capture as cuda_graph
from engine.step_watch import COLLECTIVES, REST, StepWatch
from engine.tally import CountedCollectives, CountedExperts, Tally
from engine.vocabulary import Vocabulary
from engine.warm_up import warm_up_passes
from engine.weights import Fill, Progress

__all__ = ["Chunk", "Inputs", "ModelRunner"]

OnLayer = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A pass as it was laid out. No dp rank has more than `most_rows` tokens in it."""

    batch: Batch
    angles: Angles
    most_rows: int


class ModelRunner:
    """A loaded model with its cache.

    Raises WeightError where the weights do not fit the configuration, and UnsupportedError
    where the device has no kernels.
    """

    def __init__(
        self,
        *,
        folder: Path | None,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int | Callable[[Layout], int],
        block_size: int,
        layout: Layout | None = None,
        ranks: Collectives | None = None,
        experts: ExpertGroup | None = None,
        dispatch: str = AUTO_DISPATCH,
        expert_maps: Mapping[int, ExpertMap] | None = None,
        redundant_experts: int = 0,
        ring: Wire | None = None,
        ring_mode: str = AUTO,
        stages: Wire | None = None,
        keeps_logits: bool = False,
        choose_grain: Callable[[Trial], int] | None = None,
        progress: Progress | None = None,
        fill: Fill | None = None,
        allocate: Allocate | None = None,
        watch: StepWatch | None = None,
        deterministic: bool = False,
    ) -> None:
        """The weights are the folder's, or what `fill` gives their slots in its place.

        `num_blocks` are the instance's; with cp each has a grain on every cp rank, which
        `choose_grain` chooses by timing passes of the loaded model where the layout leaves it open.

        With a layout of several ranks, `ranks` joins those of tp, `ring` those of cp, in the way
        `ring_mode` says (engine.ring.passes.MODES), and `stages` those of pp: all must run the same
        passes. With ep or dp, `experts` joins those that share the experts, in the way `dispatch`
        says (engine.dispatch), whose places are `expert_maps`' by layer, else even, with
        `redundant_experts` more on each ep rank; all dp ranks have as many blocks. With
        `keeps_logits` all ranks of the last stage get logits, each those of its part of the
        `vocabulary`.

        With `deterministic` a sequence's logits are the same to the bit whatever else is in a pass,
        and a prompt's also however it is cut (Chunk.is_prompt) or cached; for this layout and
        number of threads. Raises UnsupportedError where that cannot be: with cp, and where timing
        or replicas choose how an expert's part is added up.
        """
        layout = layout or Layout()
        layout.check(config)
        self.config = config
        check_redundant(redundant_experts, layout, config)
        # The times and the collectives of steps, where somebody counts steps.
        self.watch = watch or StepWatch()
        self.tally = Tally(watch=self.watch)
        ranks = CountedCollectives(ranks, self.tally) if ranks is not None else None
        experts = CountedExperts(experts, self.tally) if experts is not None else None
        self.deterministic = deterministic
        if deterministic:
            ranks, experts = in_order(layout, ranks, experts)
        with torch.inference_mode():
            self._placement = placement = Placement(
                dtype=dtype,
                device=device,
                layout=layout,
                ranks=ranks or Alone(),
                whole_logits=not keeps_logits,
                dispatch=dispatch_for(
                    config, layout, ranks or Alone(), experts, device=device, setting=dispatch
                ),
                expert_maps=expert_maps or {},
                redundant_experts=redundant_experts,
                watch=self.watch,
                deterministic=deterministic,
            )
            if deterministic:
                check_deterministic(placement)
            if expert_maps and placement.dispatch is None:
                raise ValueError("maps of experts need a group of the ranks that share them")
            self._stream = placement.stream
            self._model = load_model(config, placement, folder, fill, progress)
        self.experts = SplitExperts(self._model.sparse, placement, config.hidden_size)
        self._is_last_stage = layout.pp_rank == layout.pp - 1
        # What the way to other stages belongs to, of a step's parts.
        self._between = COLLECTIVES if layout.pp > 1 else REST
        self._num_heads = config.num_heads // layout.tp
        self._stages: Stages = OneStage()
        if layout.pp > 1:
            self._stages = Apart(layout.pp_rank, width=config.hidden_size, device=device)
        if layout.grain_is_open and choose_grain is not None:
            layout = replace(layout, cp_grain=choose_grain(self._trial))
        self.layout = layout
        self._dealing = dealing_of(layout, block_size)
        if not isinstance(num_blocks, int):
            num_blocks = num_blocks(layout)
        self._attend = attention_kernel(device, config.latent, deterministic=deterministic)
        self._attend_prompt = prompt_kernel(device)
        # Outside inference mode: transfers write into the cache from other threads.
        self.cache = KVCache(
            config=config,
            dtype=dtype,
            device=device,
            num_blocks=num_blocks * (self._dealing.grain // block_size),
            block_size=block_size,
            layout=layout,
            allocate=allocate,
        )
        self._ring = self._join_ring(ring, ring_mode) if layout.cp > 1 else None
        if layout.pp > 1:
            self._stages = self._join_stages(stages, keeps_logits)
        self._graphs: StepGraphs | None = None

    def _join_ring(self, wire: Wire | None, mode: str) -> Ring:
        layout = self.layout
        if wire is None or (wire.size, wire.rank) != (layout.cp, layout.cp_rank):
            raise ValueError(f"{layout} needs a wire between its {layout.cp} cp ranks")
        return Ring(wire, self._dealing, self.cache, mode)

    def _join_stages(self, wire: Wire | None, keeps_logits: bool) -> Pipeline:
        layout = self.layout
        if wire is None or (wire.size, wire.rank) != (layout.pp, layout.pp_rank):
            raise ValueError(f"{layout} needs a wire between its {layout.pp} stages")
        return Pipeline(
            wire,
            width=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            leads=layout.cp_rank == layout.tp_rank == 0,
            device=self._placement.device,
            keeps_logits=keeps_logits,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the instance; each holds `block_tokens`."""
        return self.cache.num_blocks * self.cache.block_size // self._dealing.grain

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the instance, over all of its cp ranks."""
        return self._dealing.round

    @property
    def vocabulary(self) -> Vocabulary:
        """Which part of the vocabulary this rank has, and how to choose tokens with the others."""
        layout, size = self.layout, self.config.vocab_size
        return Vocabulary(
            part=layout.ragged_part(size),
            size=size,
            rank=layout.tp_rank,
            degree=layout.tp,
            ranks=self._placement.ranks,
        )

    def local_blocks(self, table: Sequence[int]) -> Sequence[int]:
        """Return the blocks of this rank's cache that blocks of the instance stand for."""
        return self._dealing.blocks(table, self.cache.block_size)

    def forward(
        self,
        chunks: Sequence[Chunk],
        on_layer: OnLayer | None = None,
        dp_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """Compute the chunks, cache their K and V, and return the logits after each chunk.

        The result is [S, V] in fp32, in the chunks' order; with cp it is [0, V] on all ranks but
        cp rank 0, and with pp on all but the first of each dp rank. `on_layer(l)` is called as soon
        as the K and V of all chunks in layer l, of this rank's, are in the cache.

        With dp, `dp_tokens` are the tokens that each dp rank has in this pass, its own chunks; all
        ranks give the same, and one without chunks takes part all the same. Raises BatchError
        before anything is written where a chunk cannot be run; on a dp rank alone, the others wait
        for it as long as their group does.
        """
        return self.start(chunks, on_layer, dp_tokens).wait()

    def start(
        self,
        chunks: Sequence[Chunk],
        on_layer: OnLayer | None = None,
        dp_tokens: Sequence[int] | None = None,
    ) -> Logits:
        """Do as `forward` does, but return when this rank's stage is done with the pass."""
        if self._ring is not None:
            return self._run_ring(self._ring, chunks, on_layer)
        inputs = self.prepare(chunks, dp_tokens)
        attend_last = self._last_rows_attention(inputs.batch)
        return self._run(inputs, inputs.batch.last_rows_S, attend_last, on_layer)

    @torch.inference_mode()
    def prepare(self, chunks: Sequence[Chunk], dp_tokens: Sequence[int] | None = None) -> Inputs:
        """Lay out a pass of one cp rank; from any thread, also while another pass runs.

        Raises BatchError where a chunk cannot be run. See `forward`.
        """
        most_rows = self._most_rows(chunks, dp_tokens)
        batch = self._batch(chunks)
        angles = self._model.rotary.angles(batch.positions_T, batch.end)
        if self._graphs is not None and batch.decode:
            _ = batch.decode.on_device  # so that it is on its way when the pass is played
        return Inputs(batch=batch, angles=angles, most_rows=most_rows)

    def step(
        self, inputs: Inputs, token_ids: Sequence[int], meanwhile: Callable[[], None]
    ) -> Tensor:
        """Do as `forward` does with chunks of one token each, which were prepared with any tokens.

        `token_ids` are the right ones, one for each chunk. `meanwhile` is called, at most once,
        where the interpreter goes on to do nothing but wait for the pass.
        """
        batch = inputs.batch.with_tokens(token_ids, self.config.vocab_size)
        wanted_S = batch.last_rows_S
        return self._run(replace(inputs, batch=batch), wanted_S, None, None, meanwhile).wait()

    @torch.inference_mode()
    def record_steps(
        self,
        max_sequences: int,
        max_tokens: int,
        progress: Progress | None = None,
        capture: Capture = cuda_graph,
    ) -> int:
        """Record passes of up to so many decoding sequences of up to so many tokens each.

        From here on they are played where they fit; returns how many there are. `progress` is told
        how many are recorded, and of how many. Raises UnsupportedError where a pass needs the host
        on its way: with several ranks, and on a CPU.
        """
        if self.layout.ranks > 1:
            raise UnsupportedError(
                f"steps of {self.layout} cannot be recorded: only those of a rank"
            )
        if self._placement.device.type == "cpu" and capture is cuda_graph:
            raise UnsupportedError("steps on the device cpu cannot be recorded; there is: cuda")

        def run(batch: Batch, angles: Angles) -> Tensor:
            shared = self._pass(Inputs(batch=batch, angles=angles, most_rows=len(batch.decode)))
            return self._model(shared, batch.last_rows_S, None)

        self._graphs = StepGraphs(
            run,
            self.cache,
            head_size=self.config.turned_size,
            max_sequences=max_sequences,
            max_tokens=min(max_tokens, self.num_blocks * self.block_tokens),
            capture=capture,
            progress=progress,
        )
        self.experts.take_loads()
        return len(self._graphs)

    def forward_all(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Do as `forward` does, and return the logits of every token: [T, V] for each chunk.

        For one cp rank, one dp rank and one stage only.
        """
        assert self._ring is None
        inputs = self.prepare(chunks)
        batch = inputs.batch
        rows_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
        logits_TV = self._run(inputs, rows_T, None, None).wait()
        return [logits_TV[rows] for rows in batch.rows_of]

    def warm_up(self) -> None:
        """Run passes of typical shapes, so that the first request does not pay for set-up.

        Writes into block 0 upwards and zeroes it again: call it before any sequence runs.
        """
        device = self._placement.device
        for chunks in warm_up_passes(
            self.num_blocks * self.block_tokens,
            self.block_tokens,
            self._dealing.ranks,
            all_forms=has_forms(device),
        ):
            tokens = sum(len(chunk.token_ids) for chunk in chunks)
            logits_SV = self.forward(chunks, dp_tokens=(tokens,) * self.layout.dp)
            blocks = range(max(len(chunk.block_table) for chunk in chunks))
            self.cache.tensor[:, :, : len(self.local_blocks(blocks))].zero_()
        warm_up_sampling(logits_SV, device)
        self.experts.take_loads()  # those were not requests'

    @staticmethod
    def kv_block_bytes(
        config: ModelConfig, dtype: torch.dtype, block_size: int, layout: Layout | None = None
    ) -> int:
        """Return what a block takes on this rank over all layers, to size a cache by its memory."""
        layout = layout or Layout()
        blocks = dealing_of(layout, block_size).grain // block_size
        return blocks * KVCache.block_bytes(config, dtype, block_size, layout)

    def _most_rows(self, chunks: Sequence[Chunk], dp_tokens: Sequence[int] | None) -> int:
        own = sum(len(chunk.token_ids) for chunk in chunks)
        if dp_tokens is None and self.layout.dp == 1:
            return own
        found = None if dp_tokens is None else list(dp_tokens)
        if found is None or len(found) != self.layout.dp or found[self.layout.dp_rank] != own:
            raise BatchError(
                f"dp rank {self.layout.dp_rank} of {self.layout.dp} has {own} tokens; dp_tokens "
                f"is {found}: it must say how many each dp rank has"
            )
        if not any(found):
            raise BatchError("a pass needs at least one chunk on some dp rank")
        return max(found)

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        if not chunks and self.layout.dp > 1:
            return no_batch(self.cache)
        return make_batch(
            chunks, self.cache, self.config.vocab_size, deterministic=self.deterministic
        )

    def _last_rows_attention(self, batch: Batch) -> Attend | None:
        """Return attention of the chunks' last tokens, from the cache, as if they were decoded."""
        last = batch.last
        if last is None:
            return None
        decode = replace(batch, decode=last.rows, prefill=())

        def attend_last(layer: int, q_SNH: Tensor) -> Tensor:
            runs = self.cache.runs[layer]
            out_SI = self._attend(q_SNH[last.order_S], runs, decode, self._num_heads)
            return out_SI[last.back_S]

        return attend_last

    @torch.inference_mode()
    def _run(
        self,
        inputs: Inputs,
        wanted_S: Tensor,
        attend_last: Attend | None,
        on_layer: OnLayer | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Logits:
        batch = inputs.batch
        is_step = not batch.prefill and on_layer is None and wanted_S is batch.last_rows_S
        if self._graphs is not None and is_step:
            logits_SV = self._graphs.play(batch, inputs.angles)
            if logits_SV is not None:
                if meanwhile is not None:
                    meanwhile()
                return self._pass_on(logits_SV, len(wanted_S))
        shared = self._pass(inputs, attend_last, on_layer, meanwhile)
        return self._pass_on(self._model(shared, wanted_S, self._receive(shared)), len(wanted_S))

    def _pass(
        self,
        inputs: Inputs,
        attend_last: Attend | None = None,
        on_layer: OnLayer | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Pass:
        # How many of a prompt's tokens are new decides: not where that must not matter.
        latent = None if self.deterministic else self.config.latent
        batch, prompts = split(inputs.batch, latent)

        def attend(layer: int, qkv_TNH: Tensor) -> Tensor:
            return self._attend(qkv_TNH, self.cache.runs[layer], batch, self._num_heads)

        def attend_prompt(
            layer: int, q_QNK: Tensor, span: PrefillSpan, weights: LatentWeights
        ) -> Tensor:
            return self._attend_prompt(q_QNK, self.cache.runs[layer], span, weights)

        return Pass(
            token_ids_T=batch.token_ids_T,
            slot_mapping_TX=batch.slot_mapping_TX,
            angles=inputs.angles,
            cache=self.cache,
            attend=attend,
            attend_last=attend_last,
            decode=None if inputs.batch.prefill else batch.decode,
            on_layer=on_layer,
            most_rows=inputs.most_rows,
            meanwhile=meanwhile,
            prompts=prompts,
            attend_prompt=attend_prompt,
        )

    @torch.inference_mode()
    def _run_ring(self, ring: Ring, chunks: Sequence[Chunk], on_layer: OnLayer | None) -> Logits:
        made = ring.make_pass(chunks, self.config.vocab_size)
        end = max(chunk.end for chunk in chunks)
        shared = Pass(
            token_ids_T=made.token_ids_T,
            slot_mapping_TX=made.slot_mapping_TX,
            angles=self._model.rotary.angles(made.positions_T, end),
            cache=ring.cache,
            attend=ring.attention(made, self._num_heads),
            attend_last=None,  # every rank's part of the ring is all of its queries
            decode=None,
            on_layer=on_layer,
            most_rows=len(made.token_ids_T),
        )
        rows = [row for _, row in made.last_rows]
        wanted_S = torch.tensor(rows, dtype=torch.long, device=made.token_ids_T.device)
        result = self._model(shared, wanted_S, self._receive(shared))
        if self._is_last_stage:
            result = ring.collect(made, result)
        return self._pass_on(result, len(chunks))

    def _receive(self, shared: Pass) -> Tensor | None:
        before = self.watch.to(self._between)
        found = self._stages.receive(self._stream.rows(len(shared.token_ids_T)))
        self.watch.to(before)
        return found

    def _pass_on(self, result: Tensor, sequences: int) -> Logits:
        before = self.watch.to(self._between)
        found = self._stages.pass_on(result, sequences)
        self.watch.to(before)
        return found

    def _trial(self, tokens: int, wire: Wire) -> Callable[[], object]:
        """See Trial. The pass has a cache of its own, one block: there is no other yet.

        Of several stages each does its part by itself: the ring is within a stage.
        """
        dtype, device = self._placement.dtype, self._placement.device
        cache = KVCache(
            config=self.config,
            dtype=dtype,
            device=device,
            num_blocks=1,
            block_size=tokens,
            layout=self._placement.layout,
        )
        ring = Ring(wire, Dealing(wire.size, tokens), cache, Variant.PASS_KV.value)
        # Different tokens, so that a mixture's experts all have something to do.
        ids = [token % self.config.vocab_size for token in range(tokens * wire.size)]
        chunk = Chunk(token_ids=ids, start=0, block_table=(0,))

        def run() -> None:
            self._run_ring(ring, [chunk], None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run
